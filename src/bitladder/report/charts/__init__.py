"""Charts as values: each is a figure of plotly.js (data and layout), made without drawing anything.

Colours are names such as "@rung"; the page puts in those of its light or dark theme.
"""
