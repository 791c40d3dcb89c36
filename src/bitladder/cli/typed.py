"""What is typed: unknown commands get the closest name, and lists may have spaces after their commas."""

import click

from bitladder.errors import did_you_mean


class NamingGroup(click.Group):
    """A group of commands that suggests a name for an unknown one and accepts `--ladder Q4_K_M, Q6_K`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first word names, and the words after it."""
        word = click.utils.make_str(args[0])
        if not word.startswith("-") and self.get_command(ctx, word) is None:
            ctx.fail(f"no command {word!r}{did_you_mean(word, self.list_commands(ctx), 'there are')}")
        name, command, rest = super().resolve_command(ctx, args)
        return name, command, rest if command is None else joined_lists(command, rest)


def joined_lists(command: click.Command, words: list[str]) -> list[str]:
    """Words of a command line with each list in one word: a value that ends in a comma goes on in the next word.

    Parameters:
        command: the command. Only values of its options that take text are joined.
        words: the words after the command's name.
    """
    flags = {
        flag
        for option in command.params
        if isinstance(option, click.Option) and isinstance(option.type, click.types.StringParamType)
        for flag in option.opts
    }
    joined: list[str] = []
    is_value = False
    for word in words:
        if is_value and joined[-1].endswith(","):
            joined[-1] += word
            continue
        flag, equals, _ = word.partition("=")
        is_value = bool(joined and joined[-1] in flags) or bool(equals and flag in flags)
        joined.append(word)
    return joined
