"""Log of UK AISI's Inspect from stored conversations: `inspect view` filters, sorts and shows all of them.

One sample per trajectory, its epoch the place in its group; turns with their images; a score per component, and the
total and advantage under each mix. This module alone imports inspect_ai, which the extra `inspect` installs.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from thinkimg import __version__
from thinkimg.analysis.view import Entry, View, explain_component, format_score
from thinkimg.errors import UserError
from thinkimg.records import CallStatus, StopReason, Turn, TurnKind
from thinkimg.rewards.mix import RIGHT
from thinkimg.store import files
from thinkimg.store.lineage import describe
from thinkimg.tracking.traces import chat_messages

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample
    from inspect_ai.model import ChatMessage
    from inspect_ai.scorer import Score

THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*(.*)", re.DOTALL)
"""Thought of a turn, whose opening tag the chat template may have written, and the rest."""
STOPS = {StopReason.TRUNCATED: "max_tokens", StopReason.MAX_TOKENS: "model_length", StopReason.ANSWER: "stop"}


def load_inspect() -> ModuleType:
    """Import inspect_ai. Raises UserError where the extra is not installed."""
    try:
        import inspect_ai.log
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "inspect_ai":
            raise
        raise UserError(
            "`thinkimg view` needs Inspect, which is not installed.", hint="pip install 'thinkimg[inspect]'"
        ) from None
    return inspect_ai.log


def write_log(view: View, directory: Path) -> Path:
    """Write the log of a view into a directory, in place of an earlier one of the same artifact; return its path.

    Raises UserError where Inspect is not installed or a picture can't be made.
    """
    inspect = load_inspect()
    files.make_directory(directory)
    path = directory / f"{view.artifact.kind}-{view.artifact.short}.eval"
    with files.replacing(path.absolute()) as temporary:
        inspect.write_eval_log(make_log(view), str(temporary), format="eval")
    return path


def make_log(view: View) -> "EvalLog":
    """Return the log of a view; every picture is in memory once."""
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalResults, EvalSpec, EvalStats

    load_inspect()
    samples = [make_sample(entry, view) for entry in view.entries()]
    manifest, recipe = view.episodes.manifest, view.episodes.manifest["recipe"]
    policy = view.episodes.inputs.get("policy")
    model = f"policy/{(policy.fingerprint or policy.digest)[:12]}" if policy else "script"
    artifacts = {"rollouts": view.episodes, "scores": view.scores, "dataset": view.dataset}
    references = {name: str(artifact.reference) for name, artifact in artifacts.items() if artifact is not None}
    ids = list(dict.fromkeys(sample.id for sample in samples))
    spec = EvalSpec(
        created=manifest["finished"],
        task=f"{view.artifact.kind} {view.artifact.short}",
        task_id=view.artifact.fingerprint,
        run_id=view.artifact.digest,
        dataset=EvalDataset(name=f"dataset/{view.dataset.short}", samples=len(ids), sample_ids=ids),
        model=model,
        config=EvalConfig(epochs=max((sample.epoch for sample in samples), default=1)),
        packages={"thinkimg": __version__},
        task_args=recipe["config"],
        metadata={"artifact": describe(view.artifact)} | references,
    )
    scores = list(summarise(samples))
    results = EvalResults(total_samples=len(samples), completed_samples=len(samples), scores=scores)
    stats = EvalStats(started_at=manifest["started"], completed_at=manifest["finished"])
    return EvalLog(status="success", eval=spec, results=results, stats=stats, samples=samples)


def summarise(samples: Iterable["EvalSample"]) -> Iterator[Any]:
    """Yield an EvalScore per score of the samples: the mean of the values that are there, and how many are not.

    `right` has the accuracy of the greedy answers beside it, which are the first of each sample.
    """
    from inspect_ai.log import EvalMetric, EvalScore

    values: dict[str, list[tuple[int, float]]] = {}
    for sample in samples:
        for name, score in (sample.scores or {}).items():
            values.setdefault(name, []).append((sample.epoch, score.as_float()))
    for name, listed in values.items():
        present = [value for _, value in listed if not math.isnan(value)]
        greedy = [value for epoch, value in listed if epoch == 1 and not math.isnan(value)]
        figures = {"mean": present} | ({"accuracy": greedy} if name == "right" else {})
        yield EvalScore(
            name=name,
            scorer=name,
            scored_samples=len(present),
            unscored_samples=len(listed) - len(present),
            metrics={
                key: EvalMetric(name=key, value=math.fsum(listed) / len(listed))
                for key, listed in figures.items()
                if listed
            },
        )


def make_sample(entry: Entry, view: View) -> "EvalSample":
    """Return a conversation as a sample."""
    from inspect_ai.log import EvalError, EvalSample
    from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ModelOutput, ModelUsage

    row, sample = entry.row, entry.sample
    messages = list(convert_messages(entry, view.system))
    tokens = sum(turn.tokens for turn in row.turns)
    last = next((message for message in reversed(messages) if message.role == "assistant"), None)
    choice = ChatCompletionChoice(
        message=last or ChatMessageAssistant(content=""), stop_reason=STOPS.get(row.stop, "unknown")
    )
    return EvalSample(
        id=row.sample_id,
        epoch=row.index + 1,
        uuid=row.trajectory_id,
        input=sample.question,
        choices=list(sample.choices) or None,
        target=list(sample.answers),
        messages=messages,
        output=ModelOutput(model=row.policy[:12], choices=[choice]),
        scores=make_scores(entry, greedy=view.episodes.kind == "evaluation"),
        model_usage={row.policy[:12]: ModelUsage(output_tokens=tokens, total_tokens=tokens)},
        metadata={
            "trajectory": row.trajectory_id,
            "group": row.group_id,
            "stop": str(row.stop),
            "calls": sum(turn.kind is TurnKind.TOOL for turn in row.turns),
            "images": list(row.images),
            "weights": row.weights,
            "source": sample.source,
            **({"family": sample.metadata["family"]} if "family" in sample.metadata else {}),
            **({"columns": sample.columns} if sample.columns else {}),
        },
        error=EvalError(message=row.error, traceback="", traceback_ansi="") if row.error else None,
    )


def make_scores(entry: Entry, *, greedy: bool) -> dict[str, "Score"]:
    """Return name -> score: advantage and total under each mix, then the components.

    greedy: name the answer's being right, too, as an evaluation counts it.
    """
    from inspect_ai.scorer import Score

    scores: dict[str, Score] = {}
    answer = entry.row.answer
    for weighed in entry.weighed:
        by = f"_{weighed['by'].rpartition('/')[2]}" if len(entry.weighed) > 1 else ""
        metadata = {key: weighed[key] for key in ("by", "trained", "included", "reason", "terms")}
        why = f"{weighed['why']} Mix of {weighed['by']}{'' if weighed['trained'] else ', which trained nothing here'}."
        scores[f"advantage{by}"] = Score(value=weighed["advantage"], answer=answer, explanation=why, metadata=metadata)
        terms = (f"{term['weight']:.4g} x {term['column']} {format_score(term['value'])}" for term in weighed["terms"])
        total = " + ".join(terms)
        scores[f"total{by}"] = Score(value=weighed["total"], answer=answer, explanation=total)
    for name, component in entry.components.items():
        metadata = {key: component[key] for key in ("evidence", "judgements") if component[key]} or None
        explanation = "\n\n".join(explain_component(component)) or None
        if component["value"] is None:
            scores[name] = Score.unscored(answer=answer, explanation=explanation, metadata=metadata)
        else:
            scores[name] = Score(value=component["value"], answer=answer, explanation=explanation, metadata=metadata)
    if greedy and "answer" in scores:
        value = scores["answer"].as_float()
        right = value if math.isnan(value) else float(value >= RIGHT)
        scores = {"right": Score(value=right, answer=answer, explanation=scores["answer"].explanation)} | scores
    return scores


def convert_messages(entry: Entry, system: str | None) -> Iterator["ChatMessage"]:
    """Yield the messages of a conversation. An image that a tool made, with its source and box, is in the tool's."""
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser

    messages = chat_messages(entry.row, entry.sample, entry.images.__getitem__, system, entry.tools)
    calls = (turn for turn in entry.row.turns if turn.kind is TurnKind.TOOL)
    for number, message in enumerate(messages):
        content = message["content"]
        match message["role"]:
            case "system":
                yield ChatMessageSystem(content=content)
            case "assistant":
                yield convert_turn(message)
            case "tool":
                after = messages[number + 1] if number + 1 < len(messages) else {}
                pictured = after.get("role") == "user" and isinstance(after["content"], list)
                yield convert_result(message, next(calls), after["content"] if pictured else [])
            case _ if number and isinstance(content, list) and messages[number - 1]["role"] == "tool":
                pass  # pictures, which the tool's message has
            case _:
                yield ChatMessageUser(content=content if isinstance(content, str) else list(convert_parts(content)))


def convert_turn(message: Mapping[str, Any]) -> "ChatMessage":
    """Return a turn of the model: its thought, its text, its call."""
    from inspect_ai.model import ChatMessageAssistant, ContentReasoning, ContentText
    from inspect_ai.tool import ToolCall

    thought = THOUGHT.fullmatch(message["content"])
    texts = [ContentReasoning(reasoning=thought[1].strip())] if thought else []
    if rest := thought[2] if thought else message["content"]:
        texts.append(ContentText(text=rest))
    calls = [
        ToolCall(id=call["id"], function=call["function"]["name"], arguments=json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls", ())
    ]
    return ChatMessageAssistant(content=texts, tool_calls=calls or None)


def convert_result(message: Mapping[str, Any], turn: Turn, pictures: list[dict[str, Any]]) -> "ChatMessage":
    """Return a tool's result: text and pictures, or the error that the model was told."""
    from inspect_ai.model import ChatMessageTool, ContentText
    from inspect_ai.tool import ToolCallError

    text = message["content"]
    refused = turn.status is CallStatus.ERROR
    return ChatMessageTool(
        content=[*([ContentText(text=text)] if text else []), *convert_parts(pictures)],
        tool_call_id=message["tool_call_id"],
        function=turn.tool,
        error=ToolCallError("unknown", turn.error or text) if refused else None,
    )


def convert_parts(parts: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """Yield the parts of a message in OpenAI's form as Inspect has them."""
    from inspect_ai.model import ContentImage, ContentText

    for part in parts:
        if part["type"] == "text":
            yield ContentText(text=part["text"])
        else:
            yield ContentImage(image=part["image_url"]["url"])
