"""What one piece of work measured, or took from the journal."""

from collections.abc import Mapping

from bitladder.trial import Journal, Measurement, Measures, recipe_key


class Measurements:
    """The recipes that were asked for here, in this order.

    The journal is a cache. What else lies in it has no influence on what is made of these measurements.

    Parameters:
        journal: where measurements are kept.
        model: what measures a recipe that the journal does not have.
    """

    def __init__(self, journal: Journal, model: Measures) -> None:
        self._journal, self._model = journal, model
        self._by_recipe: dict[str, Measurement] = {}

    def measure(self, types: Mapping[str, str], chunks: int, label: str = "") -> Measurement:
        """The divergence of a recipe on the first chunks of the text.

        Parameters:
            types: tensor → type, for the tensors that are not in full precision.
            chunks: number of chunks.
            label: what the journal calls the recipe.
        """
        measurement = self._journal.measure(self._model, types, chunks, label)
        key = recipe_key(types)
        known = self._by_recipe.get(key)
        if known is None or len(known.chunks) < chunks:
            self._by_recipe[key] = measurement
        return measurement

    def all(self) -> list[Measurement]:
        """Every recipe once, on the most chunks that were asked for."""
        return list(self._by_recipe.values())

    @property
    def tokens(self) -> int:
        """Tokens that these recipes were decoded on."""
        return sum(len(one.chunks) for one in self._by_recipe.values()) * self._journal.tokens_per_chunk
