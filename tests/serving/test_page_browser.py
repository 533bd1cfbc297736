"""The page as a person uses it: a headless Chromium at an endpoint over a scripted engine.

THINKIMG_SCREENSHOTS=directory keeps the pictures.
"""

import base64

import pytest
from chat_server import ChatServer, ScriptedClient, answer, encode, look_then_answer, picture
from chromium import Chromium, screenshot_folder, wait

from thinkimg.serving.app import Access

pytestmark = pytest.mark.long

HOSTILE = "<img src=x onerror=hacked=1><script>hacked=1</script>"
DROP = """(() => {
  const bytes = Uint8Array.from(atob("DATA"), (letter) => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], "a.png", {type: "image/png"}));
  for (const kind of ["dragover", "drop"])
    document.querySelector("main").dispatchEvent(
      new DragEvent(kind, {dataTransfer, bubbles: true, cancelable: true}));
})()"""
DROP_AND_ASK = """(() => {
  for (const size of [4000000, 1]) {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([new Uint8Array(size)], `${size}.png`, {type: "image/png"}));
    document.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
  }
  document.getElementById("text").value = "Which?";
  document.getElementById("question").requestSubmit();
})()"""
"""Two files at once, of which the first takes longer to read, and the question before both are read."""
FOCUS = "document.activeElement?.id || document.activeElement?.textContent"
IMAGES = "[...document.querySelectorAll('#log img')].map(image => [image.naturalWidth, image.naturalHeight])"


SEEN = """(answer => answer.top > 0 && answer.bottom < document.querySelector('form').getBoundingClientRect().top)(
  [...document.querySelectorAll('.answer')].at(-1).getBoundingClientRect())"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def shots(tmp_path):
    return screenshot_folder(tmp_path / "screenshots")


@pytest.fixture
def opened(browser):
    """opened(script, …): the page of an endpoint whose engine plays `script`, and that endpoint."""
    servers = []

    def open_page(script=look_then_answer, key: str | None = None, **settings) -> ChatServer:
        servers.append(ChatServer(ScriptedClient(script), access=Access(page=True, key=key), **settings))
        browser.open("about:blank")
        browser.open(f"{servers[-1].url}/")
        wait(lambda: browser.run(FOCUS) == "text", "focus on the question", browser.text)
        return servers[-1]

    yield open_page
    for server in servers:
        server.close()


def press(browser, name: str, **modifiers) -> None:
    code = {"Tab": 9, "Enter": 13}[name]
    text = {"text": "\r"} if name == "Enter" else {}
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **modifiers, **text
        )


def type_text(browser, value: str) -> None:
    browser.call("Input.insertText", text=value)


def drop(browser, data: bytes) -> None:
    count = browser.run("document.querySelectorAll('#pictures img').length")
    browser.run(DROP.replace("DATA", base64.b64encode(data).decode()))
    wait(lambda: browser.run("document.querySelectorAll('#pictures img').length") > count, "picture", browser.text)


def ask(browser, question: str, *pictures: bytes) -> None:
    for data in pictures:
        drop(browser, data)
    type_text(browser, question)
    press(browser, "Enter")


def test_a_dropped_picture_a_question_and_each_turn(opened, browser, shots):
    server = opened()
    ask(browser, "Which colour? red", encode(picture()))
    browser.wait_for("Turn 1: crop_image", "crop_image(height=28, width=28, x=0, y=0)", "Turn 2: an answer", "Answer")
    shown = ["Which colour? red", "Turn 1", "look", "crop_image(", "Its source, with the box", "Result", "Image 1: "]
    shown += ["Turn 2", "seen", "Answer"]
    text = browser.text()
    places = [text.index(part) for part in shown]
    assert places == sorted(places) and browser.run("document.querySelector('.answer p').textContent") == "red"
    wait(lambda: browser.run(IMAGES) == [[160, 120], [160, 120], [80, 120]], "pictures", lambda: browser.run(IMAGES))
    browser.screenshot(shots / "page_turns.png")
    browser.call("Emulation.setDeviceMetricsOverride", width=400, height=600, deviceScaleFactor=1, mobile=False)
    ask(browser, "And here? blue", encode(picture(1)))
    wait(lambda: browser.run("document.querySelectorAll('.answer').length") == 2, "second answer", browser.text)
    wait(lambda: browser.run(SEEN), "answer in view", browser.text)
    browser.screenshot(shots / "page_narrow.png")
    browser.call("Emulation.clearDeviceMetricsOverride")
    prompt, _ = server.engine.requests[-1]
    assert "<answer>red</answer>" in prompt and "Image 1: " in prompt.rpartition("And here?")[0]
    browser.click("document.getElementById('restart')")
    ask(browser, "Alone? green")
    wait(lambda: browser.run("document.querySelectorAll('.answer').length") == 1, "third answer", browser.text)
    assert "<answer>" not in server.engine.requests[-1][0] and "Image 0" not in server.engine.requests[-1][0]


def test_what_models_and_people_write_is_text(opened, browser, shots):
    opened(lambda *_: answer(HOSTILE), system=HOSTILE)
    ask(browser, HOSTILE)
    wait(lambda: browser.run("document.querySelectorAll('.answer').length") == 1, "answer", browser.text)
    assert browser.text().count(HOSTILE) == 2
    assert browser.run("[window.hacked, document.scripts.length, document.images.length]") == [None, 1, 0]
    # Nor could a script that had got in: the page's rules allow none but its own.
    browser.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'hacked = 2'}))")
    assert browser.run("window.hacked") is None
    opened(lambda *_: HOSTILE, max_turns=1)
    ask(browser, "q")
    browser.wait_for("Turn 1: a turn that breaks the protocol", HOSTILE, "The policy gave no answer.")
    assert browser.run("document.images.length") == 0
    browser.screenshot(shots / "page_malformed.png")


def test_errors_are_sentences_and_the_question_comes_back(opened, browser, shots):
    server = opened()
    ask(browser, "Which? red", b"no picture at all")
    browser.wait_for("A picture can't be used")
    assert browser.run("document.getElementById('text').value") == "Which? red"
    assert browser.run("document.querySelectorAll('#pictures li').length") == 1
    assert browser.run("document.querySelectorAll('.question').length") == 0
    browser.screenshot(shots / "page_error.png")
    browser.click("document.querySelector('#pictures button')")
    server.engine.gone = True
    press(browser, "Enter")
    browser.wait_for("The engine does not answer")
    server.close()
    press(browser, "Enter")
    browser.wait_for("Does `thinkimg chat` still run?")


def test_a_question_under_way_can_be_stopped(opened, browser):
    server = opened()
    server.engine.delay = 60
    ask(browser, "Which? red")
    browser.wait_for("The policy is at work")
    type_text(browser, "More")
    press(browser, "Enter")  # a second question waits for the first
    browser.click("document.getElementById('stop')")
    wait(lambda: server.engine.cancelled == 1, "cancelled request")
    wait(lambda: "at work" not in browser.text(), "end", browser.text)
    assert browser.run("document.getElementById('text').value") == "Which? red\nMore"
    assert len(server.engine.requests) == 1
    server.engine.delay = 0
    press(browser, "Enter")
    wait(lambda: browser.run("document.querySelectorAll('.answer').length") == 1, "answer", browser.text)


def test_it_asks_for_the_key_and_sends_it(opened, browser):
    opened(key="s3cret")
    browser.wait_for("The API key is missing or wrong.", "Key")
    for key, text in (("wrong", "missing or wrong"), ("s3cret", "Turn 1: an answer")):
        browser.run("document.getElementById('key').value = ''; document.getElementById('key').focus()")
        type_text(browser, key)
        browser.run("document.getElementById('text').value = ''; document.getElementById('text').focus()")
        ask(browser, "Which? Image 1:")
        browser.wait_for(text)


def test_pictures_that_are_being_read_are_waited_for(opened, browser):
    """None is lost, none comes back in another conversation, and no question goes without one."""
    shown = "document.querySelectorAll('#pictures li').length"
    opened()
    browser.run(DROP_AND_ASK)
    wait(lambda: browser.run(shown) == 2, "both pictures", browser.text)
    assert not browser.run("document.querySelectorAll('.question').length")
    assert not browser.run("document.getElementById('ask').disabled")
    browser.run(f"document.getElementById('restart').click(); {DROP_AND_ASK}")
    browser.run("document.getElementById('restart').click()")
    wait(lambda: not browser.run("document.getElementById('ask').disabled"), "both read", browser.text)
    assert browser.run(shown) == 0


def test_all_of_it_is_reached_by_the_keyboard(opened, browser, shots):
    opened()
    drop(browser, encode(picture()))
    order = []
    for _ in range(8):
        press(browser, "Tab")
        order.append(browser.run(FOCUS))
    browser.screenshot(shots / "page_focus.png")
    assert {"files", "ask", "restart", "text", "×"} <= set(order)
    browser.run("document.getElementById('text').focus()")
    type_text(browser, "one")
    press(browser, "Enter", modifiers=8)
    type_text(browser, "line")
    assert browser.run("document.getElementById('text').value") == "one\nline"
    assert not browser.run("document.querySelectorAll('.question').length")


def test_a_chosen_file_is_asked_about(opened, browser, tmp_path):
    server = opened()
    (tmp_path / "my picture.png").write_bytes(encode(picture()))
    document = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=document, selector="#files")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(tmp_path / "my picture.png")])
    browser.click("document.querySelector('#pictures img')")
    browser.run("document.getElementById('text').focus()")
    ask(browser, "Which? red")
    browser.wait_for("Turn 1: crop_image")
    assert "Image 0: 56x28 pixels." in server.engine.requests[0][0]
