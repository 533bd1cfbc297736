"""Small records in the forms of public data sets; nothing is taken from a set but its form.

ROWS maps a name to (schema, record, fields): the fields after `tidy`, so far as a test names them.
"""

import base64
import json
from typing import Any

IMAGE = {"bytes": b"\x89PNG", "path": None}
BASE64 = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(200)).decode()
SYSTEM = {"role": "system", "content": "You are helpful.\n# Tools\n<tools>{}</tools> <tool_call></tool_call>"}
ZOOM = "\nThink first, call **image_zoom_in_tool** if needed, then answer. Format strictly as:  <think>...</think>  "
FOCUS = (
    "\nThink in the mind first, and then decide whether to call tools one or more times OR provide final answer. "
    "Format strictly as: <think>...</think> <tool_call>...</tool_call> OR <answer>...</answer> (if no tools needed)."
)
FIRST = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    r"The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \boxed{}."
)
COLOURS = ["red", "blue", "green", "yellow"]
LINES = "\nA) red\nB) blue\nC) green\nD) yellow"
Row = tuple[str, dict[str, Any], dict[str, Any]]


def verl(prompt: str, gold: str, *, source: str = "x", images: Any = None, **extra: Any) -> dict[str, Any]:
    """Return a record of verl's form."""
    return {
        "data_source": source,
        "prompt": [SYSTEM, {"role": "user", "content": prompt}],
        "images": [IMAGE] if images is None else images,
        "ability": "vl_chat",
        "reward_model": {"ground_truth": gold, "style": "model"},
        "extra_info": {"answer": gold, "index": "0", "split": "train", **extra},
    }


def talk(*texts: str, roles: tuple[str, str] = ("user", "assistant"), keys: tuple[str, str] = ("role", "content")):
    """Return a conversation in which the roles take turns."""
    return [{keys[0]: roles[place % 2], keys[1]: text} for place, text in enumerate(texts)]


def sharegpt(*texts: str) -> list[dict[str, str]]:
    """Return a conversation of sharegpt's form."""
    return talk(*texts, roles=("human", "gpt"), keys=("from", "value"))


QUESTION = "What color is the sign?"
CALL = '<think>Closer.</think> <tool_call>{"name": "zoom"}</tool_call>'
CROP = '<think>It\'s small.</think> <grounding>{"bbox_2d": [0.1, 0.1, 0.2, 0.2]}</grounding>'
END = json.dumps({"thought": "done", "actions": [{"name": "Terminate", "arguments": {"ans": "1985"}}]})
ACT = json.dumps({"thought": "look", "actions": [{"name": "OCR", "arguments": {"image": "img_1"}}]})
STEPS = "You are a visual assistant capable of generating and solving steps for charts. <image>\n\nQuestion: "
SENTENCE = "The color of the sign is red."
VTOOL = (
    "Below are examples.\n# USER REQUEST #: <A image here> What is the title?\nANSWER: x\n"
    "<image> # USER REQUEST #: How many bars?\n# USER Bounding Box Info: x_values_bbox, storing x values.\n"
    "# USER IMAGE stored in image_1, as PIL image."
)
ASKED = {"question": QUESTION}
CHOSEN = {"answer": "red", "choices": COLOURS, "answer_type": "choice"}
REGION = " Please provide the bounding box coordinate of the region that can help you answer the question better."

ROWS: dict[str, Row] = {
    "deepeyes vstar": (
        "verl",
        verl(f"<image>\n{QUESTION}{ZOOM}", SENTENCE, source="vstar", question=QUESTION),
        {**ASKED, "answer": SENTENCE, "answer_type": "judge"},
    ),
    "deepeyes chart": (
        "verl",
        verl(f"<image>\n{QUESTION}{LINES}{ZOOM}", "A", source="chart", question=QUESTION),
        {**ASKED, **CHOSEN},
    ),
    "deepeyes thinklite": (
        "verl",
        verl(f"<image>\n{FIRST}\nQuestion:\nHow long is AB?", r"2\sqrt{3}", source="thinklite_eureka"),
        {"question": "How long is AB?", "answer": r"2\sqrt{3}", "answer_type": "maths"},
    ),
    "deepeyes thinklite, a number": (
        "verl",
        verl(f"<image>\n{FIRST}\nQuestion:\nHow large is it?", "60", source="thinklite_eureka"),
        {"question": "How large is it?", "answer": "60", "answer_type": "maths"},
    ),
    "deepeyes thinklite, a word": (
        "verl",
        verl(f"<image>\n{FIRST}\nQuestion:\nIs it red?", "Yes", source="thinklite_eureka"),
        {"question": "Is it red?", "answer": "Yes", "answer_type": None},
    ),
    "geo3k of verl": (
        "verl",
        verl(f"<image>Find x. {FIRST}", r"2 \sqrt { 221 }", source="hiyouga/geometry3k", question="<image>Find x."),
        {"question": "Find x.", "answer_type": "maths"},
    ),
    "chain of focus": (
        "verl",
        verl(
            f"<image> Question: {QUESTION}\nAnswer the question using a single word or phrase.{FOCUS}",
            "red",
            images=[{"image": "file:///mnt/images/a.jpg"}],
            question=QUESTION,
        ),
        {**ASKED, "answer": "red", "images": ["/mnt/images/a.jpg"]},
    ),
    "vtool": ("verl", verl(VTOOL, "7"), {"question": "How many bars?", "answer": "7"}),
    "trl": (
        "messages",
        {
            "prompt": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]}
            ],
            "images": [IMAGE],
            "solution": "red",
        },
        {**ASKED, "answer": "red", "images": [IMAGE]},
    ),
    "trl with a completion": (
        "messages",
        {"prompt": talk(QUESTION), "completion": [{"role": "assistant", "content": "red"}], "image": IMAGE},
        {**ASKED, "answer": "red"},
    ),
    "swift": (
        "messages",
        {"messages": [SYSTEM, *talk(f"<image>{QUESTION}", "red")], "images": ["a.jpg"]},
        {**ASKED, "answer": "red", "images": ["a.jpg"]},
    ),
    "mm-eureka": (
        "messages",
        {"id": "1", "conversations": talk(f"<image>{QUESTION}")[:1], "answer": "$red$", "image_urls": ["a.jpg"]},
        {**ASKED, "answer": "$red$", "images": ["a.jpg"]},
    ),
    "the cauldron": (
        "messages",
        {"texts": [{"user": QUESTION, "assistant": "red", "source": "VQAv2"}], "images": [IMAGE]},
        {**ASKED, "answer": "red", "images": [IMAGE]},
    ),
    "mmbench without a hint": (
        "letters",
        {"image": BASE64, "question": QUESTION, "hint": "nan", "A": "red", "B": "blue", "C": "nan", "answer": "B"},
        {**ASKED, "answer": "blue", "choices": ["red", "blue"]},
    ),
    "scienceqa": (
        "scienceqa",
        {
            "image": IMAGE, "question": QUESTION, "choices": COLOURS, "answer": 1, "hint": "The sign is old.",
            "lecture": "", "solution": "Signs are red.", "grade": "grade2",
        },
        {"question": f"The sign is old.\n{QUESTION}", "answer": "blue", "choices": COLOURS},
    ),
    "swift grounding": (
        "messages",
        {
            "messages": talk("<image>Find the <ref-object>.", "<bbox>"),
            "images": ["a.jpg"],
            "objects": {"ref": ["red box"], "bbox": [[1, 2, 30, 40]]},
        },
        {"question": "Find the red box.", "answer": [1, 2, 30, 40], "answer_type": "box", "box_form": "xyxy"},
    ),
    "swift grounding 0..1": (
        "messages",
        {
            "messages": talk("<image>Find the <ref-object>.", "<ref-object><bbox>"),
            "images": ["a.jpg"],
            "objects": {"ref": ["sign", "sign"], "bbox": [[0.1, 0.2, 0.3, 0.4]], "bbox_type": "norm1"},
        },
        {"question": "Find the sign.", "answer": [0.1, 0.2, 0.3, 0.4], "box_form": "unit_xyxy"},
    ),
    "swift query": (
        "messages",
        {"query": f"<image>{QUESTION}\n\nOptions:{LINES}", "response": "<answer>A</answer>", "images": ["a.jpg"]},
        {**ASKED, **CHOSEN},
    ),
    "swift grpo": (
        "messages",
        {"messages": talk(f"<image>{QUESTION}"), "images": ["a.jpg"], "solution": "<answer> red </answer>"},
        {**ASKED, "answer": "red"},
    ),
    "sharegpt": (
        "messages",
        {"id": "1", "image": "a.jpg", "conversations": sharegpt(f"<image>\n{QUESTION}", "Red.")},
        {**ASKED, "answer": "Red.", "images": "a.jpg"},
    ),
    "alpaca": (
        "messages",
        {"instruction": "<image>What is shown?", "input": "", "output": "a dog", "images": ["a.jpg"]},
        {"question": "What is shown?", "answer": "a dog"},
    ),
    "trajectory": (
        "messages",
        {
            "messages": talk(f"<image>{QUESTION}", CALL, "<image>\nGo on.", "<think>So.</think><answer>red</answer>"),
            "images": ["a.jpg", "crop.jpg"],
        },
        {**ASKED, "answer": "red", "images": ["a.jpg"]},
    ),
    "chain of focus sft": (
        "messages",
        {
            "messages": talk(
                f"<image>{QUESTION}{FOCUS}", CALL, "<tool_response><image></tool_response>", "<answer>red</answer>"
            ),
            "images": ["./images/a.jpg", "./images/a_crop.jpg"],
        },
        {**ASKED, "answer": "red", "images": ["./images/a.jpg"]},
    ),
    "mini-o3": (
        "mini_o3",
        {"doc_id": "7", "images": ["V/data/7.jpg"], "problem": f"<image>\n{QUESTION}", "solution": " red "},
        {**ASKED, "answer": "red", "images": ["V/data/7.jpg"]},
    ),
    "mini-o3 cold start": (
        "mini_o3",
        {
            "conversations": str(
                sharegpt(f"<image>\nQuestion: {QUESTION}", CROP, "Observation 1:\n<image>.", "<answer>red</answer>")
            ),
            "images": [IMAGE, {"bytes": b"crop", "path": None}],
            "image_names": ["original_image.png", "observation_1.png"],
        },
        {**ASKED, "answer": "red", "images": [IMAGE]},
    ),
    "pixel reasoner": (
        "pixel_reasoner",
        {
            "question": f"{QUESTION}\nchoices:\nA: red\nB: blue\nC: green\nD: yellow",
            "image": ["images/1.jpg"],
            "is_video": None,
            "answer": ["\\boxed{A}"],
            "qid": "q1",
        },
        {**ASKED, **CHOSEN},
    ),
    "pixel reasoner with two answers": (
        "pixel_reasoner",
        {"question": "How many?", "image": ["1.jpg"], "is_video": False, "answer": ["\\boxed{['3', 'three']}"]},
        {"question": "How many?", "answer": ["3", "three"]},
    ),
    "thyme rl": (
        "thyme",
        {
            "messages": [SYSTEM, *talk(f'<image>\n{QUESTION}\n### User Image Path:** "/x/1.png"\n### Format: <think>')],
            "images": [BASE64],
            "solution": "red",
            "question": QUESTION,
        },
        {**ASKED, "answer": "red", "images": [BASE64]},
    ),
    "thyme sft": (
        "thyme",
        {
            "image": [BASE64, BASE64],
            "question": f'<image>\n{QUESTION} Options:\nA. red\nB. blue\n### User Image Path: "/x/1.png"',
            "response": "<think>a</think><code>\n</code><sandbox_output><image></sandbox_output><answer>A</answer>",
        },
        {**ASKED, "answer": "red", "choices": ["red", "blue"], "images": [BASE64]},
    ),
    "openthinkimg": (
        "openthinkimg",
        {"image_path": "/data/charts/1.png", "query": "Which year?", "label": "1985"},
        {"question": "Which year?", "answer": "1985", "images": "/data/charts/1.png"},
    ),
    "openthinkimg sft": (
        "openthinkimg",
        {"conversations": sharegpt(f"{STEPS}Which year?", ACT, "OBSERVATION: 1985", END), "images": ["1.png"]},
        {"question": "Which year?", "answer": "1985", "images": ["1.png"]},
    ),
    "hr-bench": (
        "letters",
        {
            "index": "0",
            "question": QUESTION,
            "answer": "A",
            "category": "single",
            **dict(zip("ABCD", COLOURS, strict=True)),
            "cycle_category": "0",
            "image": BASE64,
        },
        {**ASKED, **CHOSEN, "images": BASE64},
    ),
    "mmbench": (
        "letters",
        {"question": "Which?", "hint": "A table of colors.", "A": "red", "B": "blue", "C": "nan", "D": None,
         "answer": "B", "image": BASE64},
        {"question": "A table of colors.\nWhich?", "choices": ["red", "blue"], "answer": "blue"},
    ),
    "mme-realworld": (
        "letters",
        {"bytes": BASE64, "path": "m/0.jpg", "index": 0, "question": QUESTION, "answer": "B",
         "multi-choice options": [f"({letter}) {colour}" for letter, colour in zip("ABCD", COLOURS, strict=True)]},
        {**ASKED, "choices": COLOURS, "answer": "blue", "images": BASE64},
    ),
    "mme-realworld json": (
        "letters",
        {"Question_id": "p/0", "Image": "m/0.jpg", "Text": QUESTION, "Ground truth": "B", "Category": "c",
         "Answer choices": ["(A) red", "(B) blue"]},
        {**ASKED, "choices": ["red", "blue"], "answer": "blue", "images": "m/0.jpg"},
    ),
    "treebench": (
        "letters",
        {"question": QUESTION, "A": "red", "B": "blue", "answer": "A", "category": "c", "image": BASE64,
         "target_instances": "[[10, 20, 30, 40], [1, 2, 3, 4]]"},
        {**ASKED, "answer": "red", "targets": ((10, 20, 30, 40), (1, 2, 3, 4)), "box_form": "xyxy"},
    ),
    "treevgr": (
        "letters",
        {"problem": f"<image>{QUESTION}{LINES}", "answer": "A", "images": ["a.jpg"],
         "target_instances": [{"bbox": [10, 20, 30, 40], "name": "sign"}]},
        {**ASKED, **CHOSEN, "targets": ((10, 20, 30, 40),), "box_form": "xyxy"},
    ),
    "v*": (
        "vstar",
        {"target_object": ["sign"], "bbox": [[1, 2, 3, 4]], "question": QUESTION, "options": COLOURS, "image": "a.jpg"},
        {**ASKED, **CHOSEN, "targets": ((1, 2, 3, 4),), "box_form": "xywh", "shuffle": True},
    ),
    "v* questions": (
        "vstar",
        {"image": "d/a.jpg", "category": "d", "label": "A", "question_id": 0,
         "text": f"{QUESTION}\n(A) red\n(B) blue\nAnswer with the option's letter from the given choices directly."},
        {**ASKED, "choices": ["red", "blue"], "answer": "red", "answer_type": "choice"},
    ),
    "visual-cot": (
        "viscot",
        {"question": QUESTION, "answer": "red", "image": "a.jpg", "width": 90, "height": 80,
         "bboxs": [[1, 2, 30, 40]], "dataset": "textcap", "split": "train"},
        {**ASKED, "images": "cot/textvqa/a.jpg", "targets": ((1, 2, 30, 40),), "box_form": "xyxy"},
    ),
    "visual-cot llava": (
        "viscot",
        {"image": ["cot/gqa/a.jpg", "cot/gqa/a.jpg###[1, 2, 30, 40]"], "dataset": "gqa",
         "conversations": sharegpt(f"<image>\n{QUESTION}{REGION}", "[0.011, 0.022, 0.333, 0.444]", "<image>", "red")},
        {**ASKED, "images": "cot/gqa/a.jpg", "answer": "red", "targets": ((1, 2, 30, 40),), "box_form": "xyxy"},
    ),
    "docvqa": (
        "vqa",
        {"questionId": "337", "question": "What date?", "image": IMAGE, "docId": 1, "answers": ["1/8/93", "1/8/1993"],
         "data_split": "val"},
        {"answer": ["1/8/93", "1/8/1993"], "answer_type": "text", "tolerance": None},
    ),
    "textvqa": (
        "vqa",
        {"image_id": "a", "question_id": 3, "question": "what brand?", "image": IMAGE, "answers": ["nokia"] * 10},
        {"answer": ["nokia"] * 10, "answer_type": "votes"},
    ),
    "vqav2": (
        "vqa",
        {"question": "What?", "image": IMAGE, "multiple_choice_answer": "net",
         "answers": [{"answer": "net", "answer_confidence": "yes", "answer_id": place} for place in range(10)]},
        {"answer": ["net"] * 10, "answer_type": "votes"},
    ),
    "chartqa": (
        "vqa",
        {"image": IMAGE, "query": "What is the value in 2010?", "label": ["45%"], "human_or_machine": "human"},
        {"answer": "45%", "answer_type": "number", "tolerance": 0.05},
    ),
    "chartqa of lmms": (
        "vqa",
        {"type": "human_test", "question": "Which country?", "answer": "China", "image": IMAGE},
        {"answer": "China", "answer_type": "number", "tolerance": 0.05},
    ),
    "gqa": (
        "vqa",
        {"id": "1", "imageId": "n1", "question": "Is it dark?", "answer": "yes", "fullAnswer": "Yes, it is dark.",
         "image": IMAGE},
        {"answer": "yes", "answer_type": "exact", "group": "n1"},
    ),
    "mathvista choice": (
        "mathvista",
        {"pid": "1", "question": "Which?", "image": "images/1.jpg", "decoded_image": IMAGE, "choices": ["1°", "2°"],
         "unit": None, "precision": None, "answer": "2°", "question_type": "multi_choice", "answer_type": "text"},
        {"answer": "2°", "choices": ["1°", "2°"], "answer_type": "choice", "images": IMAGE},
    ),
    "mathvista float": (
        "mathvista",
        {"pid": "2", "question": "How much?", "image": "images/2.jpg", "decoded_image": IMAGE, "choices": None,
         "unit": "$", "precision": 2.0, "answer": "0.21", "question_type": "free_form", "answer_type": "float"},
        {"question": "How much? (Unit: $)", "answer_type": "number", "decimals": 2, "choices": None},
    ),
    "open-r1": (
        "open_r1",
        {"image": IMAGE, "problem": QUESTION, "solution": "<think>a</think>\n\n<answer>A</answer>",
         "original_question": f"{QUESTION}{LINES}", "original_answer": "A"},
        {**ASKED, **CHOSEN},
    ),
    "r1-v": (
        "open_r1",
        {"image": IMAGE, "problem": "How many?", "solution": "<answer> 3 </answer>"},
        {"question": "How many?", "answer": "3"},
    ),
    "geometry3k": (
        "geometry3k",
        {"images": [IMAGE], "problem": "<image>Find x.", "answer": "60", "id": 1, "choices": ["30", "60"],
         "ground_truth": "B"},
        {"question": "Find x.", "answer": "60", "choices": None, "answer_type": "maths"},
    ),
    "easyr1": (
        "geometry3k",
        {"images": ["a.jpg"], "problem": "<image>How many?", "answer": "3"},
        {"question": "How many?", "answer": "3", "answer_type": None},
    ),
}  # fmt: skip
