"""Every table and plot of the terminal.

Only commands use these modules, each the one it needs, so this door is empty: `bitladder --help` loads none of them.
"""
