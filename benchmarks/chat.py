"""What an importance matrix of conversations does to a model for chat, against one of prose, on both kinds of text.

Conversations are made from questions of ARC, which are also the only ones that need no download: five questions with
their choices and answers each. Questions of the test part calibrate, those of the development part measure.

    python benchmarks/chat.py MODEL.gguf … --arc DIR --prose wiki.train.raw --text wiki.test.raw --work DIR
"""

import argparse
import json
import pathlib
import tempfile

from bitladder.calibrate import collect_imatrix
from bitladder.engine import Decoding
from bitladder.evaluate import EvalRequest, MeasureOptions, evaluate_several, load_or_compute_base
from bitladder.quantize import quantize
from bitladder.text import Reading, load_text

TURNS = 5  # questions of a conversation


def conversations(folder: pathlib.Path, part: str, out: pathlib.Path) -> pathlib.Path:
    """Writes conversations of the questions of a part of ARC ("Test", "Dev"), and returns the file."""
    turns = []
    for path in sorted(folder.glob(f"ARC-*-{part}.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            choices = {choice["label"]: choice["text"] for choice in record["question"]["choices"]}
            listed = "\n".join(f"{label}. {text}" for label, text in choices.items())
            answer = f"{record['answerKey']}. {choices[record['answerKey']]}"
            turns.append((f"{record['question']['stem']}\n{listed}", answer))
    lines = []
    for start in range(0, len(turns), TURNS):
        messages = [
            {"role": role, "content": content}
            for turn in turns[start : start + TURNS]
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        lines.append(json.dumps({"messages": messages}))
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def compare(model: pathlib.Path, options: argparse.Namespace, work: pathlib.Path) -> dict[str, object]:
    """The scores of the quants with each matrix, the second paired with the first."""
    files = {"prose": options.prose, "chat": conversations(options.arc, "Test", work / "calibration.jsonl")}
    quants = []
    for name, file in files.items():
        matrix, quant = work / f"{model.stem}.{name}.imatrix.gguf", work / f"{model.stem}-{name}.gguf"
        collect_imatrix(
            model,
            [load_text(str(file), model)],
            matrix,
            reading=Reading(chunks=options.calibration_chunks),
            decoding=Decoding(threads=options.threads),
        )
        quantize(model, quant, options.preset, imatrix=matrix, threads=options.threads)
        quants.append(quant)
    settings = MeasureOptions(chunks=options.chunks, threads=options.threads)
    measured = {}
    chat = str(conversations(options.arc, "Dev", work / "chat.jsonl"))
    for name, spec, only in (("prose", options.text, False), ("chat", chat, False), ("answers", chat, True)):
        text = load_text(str(spec), model, assistant_only=only)
        kept = work / f"{model.stem}.{'prose' if name == 'prose' else 'chat'}.base"
        with load_or_compute_base(model, text, settings, path=kept) as base:
            request = EvalRequest((text,), settings, (base,))
            measured[name] = [scores.to_json() for scores in evaluate_several(quants, request)]
    return measured


def main() -> None:
    """Prints a line for each model and text, and writes all scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=pathlib.Path)
    parser.add_argument("--arc", type=pathlib.Path, required=True, help="folder with ARC-*-Test.jsonl and -Dev.jsonl")
    parser.add_argument("--prose", type=pathlib.Path, required=True, help="prose to calibrate on")
    parser.add_argument("--text", type=pathlib.Path, required=True, help="prose to measure on")
    parser.add_argument("--preset", default="Q3_K_M")
    parser.add_argument("--calibration-chunks", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--work", type=pathlib.Path, help="folder for files of the benchmark")
    parser.add_argument("-o", "--out", type=pathlib.Path)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or pathlib.Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        for model in options.models:
            results[model.stem] = compare(model, options, work)
            for text, (prose, chat) in results[model.stem].items():
                gap = chat["paired"]["kld"]
                klds = f"KLD {prose['kld']['value']:.4f} with prose, {chat['kld']['value']:.4f} with chat"
                print(
                    f"{model.stem} on {text}: {klds}, difference {gap['value']:+.4f} ± {gap['error']:.4f}", flush=True
                )
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
