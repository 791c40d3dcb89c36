"""The YAML at the top of the card, as the hub reads it."""

from typing import Any

from huggingface_hub import ModelCardData

from bitladder.report.rundir import Run

# Front matter keys of the hub → keys of GGUF's general.* metadata.
PASSED_ON = {
    "license": "license",
    "license_name": "license.name",
    "license_link": "license.link",
    "language": "languages",
}
WIKITEXT = "Salesforce/wikitext"


def front_matter(run: Run) -> str:
    """The front matter's YAML, without its fences. What is not known is left out."""
    values: dict[str, Any] = {}
    if run.origin:
        values |= {"base_model": run.origin, "base_model_relation": "quantized"}
    if run.record.quantized_by:
        values["quantized_by"] = run.record.quantized_by
    values |= {"pipeline_tag": "text-generation", "library_name": "gguf"}
    general = run.full["general"]
    values |= {key: general[name] for key, name in PASSED_ON.items() if general.get(name)}
    if datasets(run):
        values["datasets"] = datasets(run)
    values["tags"] = ["gguf", "quantized", "imatrix", "llama.cpp", "bitladder"]
    # Unlike a plain dump this refuses what the hub's own reader would.
    return str(ModelCardData(**values).to_yaml(original_order=list(values))).rstrip("\n")


def datasets(run: Run) -> list[str]:
    """Hub ids of the data sets that the calibration text is from: those that were named, and WikiText by its files."""
    found = list(run.record.datasets)
    texts = run.manifest.steps["imatrix"].facts.get("texts", [])
    if any(text["name"].startswith("wiki.") for text in texts) and WIKITEXT not in found:
        found.append(WIKITEXT)
    return found
