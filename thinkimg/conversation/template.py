"""Chat template of a trained policy: renders a conversation to exactly the text on which the policy was trained."""

import json

from thinkimg.conversation.codec import END, PICTURE, REPLY, USER, Codec
from thinkimg.conversation.protocol import Protocol

# vLLM passes contents as lists of parts only to templates with a loop over message['content'].
TEMPLATE = """\
{#- Written by thinkimg: renders a conversation as the policy was trained on it. The stock template would trim texts or
    drop thoughts. The system message describes the tools; calls are text within the replies. -#}
{%- if tools %}
    {{- raise_exception('Pass no tools: the system message describes them.') }}
{%- endif %}
{%- if not messages or messages[0]['role'] != 'system' %}
    {{- BARE }}
{%- endif %}
{%- for message in messages %}
    {%- if message['tool_calls'] or message['reasoning_content'] or message['reasoning'] %}
        {{- raise_exception('Give a reply as one text, with its thought and its call, as the policy wrote it.') }}
    {%- endif %}
    {%- if not loop.first and loop.previtem['role'] != 'system' %}
        {{- '\\n' }}
    {%- endif %}
    {%- if message['role'] == 'system' and loop.first %}
        {{- BEFORE_SYSTEM }}
    {%- elif message['role'] == 'user' %}
        {{- USER }}
    {%- elif message['role'] == 'tool' and TOOLS %}
        {{- USER ~ BEFORE_RESULT }}
    {%- elif message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- set text = content if content is string else content | map(attribute='text') | join %}
        {{- REPLY ~ ('' if START and text.startswith(START) else OPENING) }}
    {%- else %}
        {{- raise_exception('There is no place for a message of role ' ~ message['role'] ~ ' here.') }}
    {%- endif %}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if 'image' in part or 'image_url' in part or part['type'] == 'image' %}
                {{- PICTURE }}
            {%- elif 'text' in part %}
                {{- part['text'] }}
            {%- else %}
                {{- raise_exception('A part of a message is a text or an image.') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message['role'] == 'system' %}
        {{- AFTER_SYSTEM }}
    {%- elif message['role'] == 'tool' %}
        {{- AFTER_RESULT ~ END }}
    {%- else %}
        {{- END }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ('\\n' if messages and messages[-1]['role'] != 'system' else '') ~ REPLY ~ OPENING }}
{%- endif %}
"""


def write_template(codec: Codec, protocol: Protocol) -> str:
    """Return the chat template, as Jinja, of a policy that was trained with a codec and a protocol.

    The text of a reply is Turn.text. An opened thought is added where it does not begin with one. Results of tools are
    messages of the role `tool`, or of the role `user` within the protocol's tags. There is no line break at the end.
    """
    bare, before_system, after_system = codec.frame_system()
    frame = frame_result(protocol)
    names = {
        "BARE": bare,
        "BEFORE_SYSTEM": before_system,
        "AFTER_SYSTEM": after_system,
        "BEFORE_RESULT": frame[0] if frame else "",
        "AFTER_RESULT": frame[1] if frame else "",
        "USER": USER,
        "REPLY": REPLY,
        "END": END,
        "PICTURE": PICTURE,
        "OPENING": codec.opening,
        "START": codec.turn_start,
    }
    sets = [f"{{%- set {name} = {quote(text)} %}}\n" for name, text in names.items()]
    comment, _, rest = TEMPLATE.partition("-#}\n")
    return "".join([comment, "-#}\n", *sets, f"{{%- set TOOLS = {str(frame is not None).lower()} %}}\n", rest])


def frame_result(protocol: Protocol) -> tuple[str, str] | None:
    """Return what a protocol puts before and after a tool's image and text; None if it puts something between them."""
    mark = "\ue000"
    texts = [part.get("text", PICTURE) for part in protocol.observation(mark, image=True)]
    before, _, after = "".join(texts).partition(PICTURE + mark)
    plain = [part.get("text", PICTURE) for part in protocol.observation(mark, image=False)]
    return (before, after) if "".join(plain) == before + mark + after else None


def quote(text: str) -> str:
    """Return a text as a literal of Jinja."""
    return json.dumps(text, ensure_ascii=False)
