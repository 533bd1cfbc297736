// Page of `thinkimg chat --page`: asks the endpoint, and shows each turn as it ends.
// What people and models wrote becomes text of a node, never HTML.
"use strict";

const GONE = "The endpoint does not answer. Does `thinkimg chat` still run?";
const ENDED = "The connection ended before the answer.";
const SMALL = 160; // pixels of a side below which a picture is enlarged without smoothing
const [log, form, text, files, key] = ["log", "question", "text", "files", "key"].map((id) => get(id));
let messages = []; // the conversation so far, as the endpoint takes it
let pictures = []; // of the next question, as data: URIs
let request = null; // controller of the one under way
let reading = 0; // files that are being read
let conversations = 0; // that were begun
let following = true; // the end of the log is in view, and stays there

function get(id) {
  return document.getElementById(id);
}

function make(kind, name, value = "") {
  const node = document.createElement(kind);
  node.className = name;
  node.textContent = value;
  return node;
}

function show(node) {
  log.append(node);
  follow();
}

function follow() {
  if (following) log.scrollTop = log.scrollHeight;
}

function makeImage(url, description) {
  const image = make("img", "");
  image.alt = description;
  image.onload = () => {
    image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) < SMALL);
    follow();
  };
  image.src = url;
  return image;
}

function showQuestion(question, urls) {
  const box = make("section", "question");
  const row = make("div", "pictures");
  row.append(...urls.map((url, number) => makeImage(url, `Picture ${number + 1} of the question`)));
  box.append(row, make("p", "", question));
  show(box);
  return box;
}

function showTurn(turn, images, number) {
  const box = make("section", "turn");
  const kind = turn.tool ?? (turn.thought === null ? "a turn that breaks the protocol" : "an answer");
  box.append(make("h2", "", `Turn ${number}: ${kind}`));
  if (turn.thought) box.append(make("p", "thought", turn.thought));
  if (turn.tool || turn.thought === null) {
    const values = Object.entries(turn.args ?? {}).map(([name, value]) => `${name}=${JSON.stringify(value)}`);
    box.append(make("pre", "", turn.tool ? `${turn.tool}(${values.join(", ")})` : turn.text));
  }
  const row = make("div", "pictures");
  images.forEach((part, index) => {
    const caption = index < images.length - 1 ? "Its source, with the box" : "Result";
    const figure = make("figure", "");
    figure.append(makeImage(part.image_url.url, caption), make("figcaption", "", caption));
    row.append(figure);
  });
  box.append(row);
  if (turn.observation) box.append(make("p", turn.error ? "observation wrong" : "observation", turn.observation));
  else if (turn.error) box.append(make("p", "wrong", turn.error));
  show(box);
}

function showAnswer(content, reason) {
  const box = make("section", "answer");
  const none = content === "?" && reason === "length";
  box.append(make("h2", "", "Answer"), make("p", none ? "wrong" : "", none ? "The policy gave no answer." : content));
  show(box);
}

function showPictures() {
  get("pictures").replaceChildren(...pictures.map((url, number) => {
    const item = make("li", "");
    const remove = make("button", "", "×");
    remove.type = "button";
    remove.ariaLabel = `Remove picture ${number + 1}`;
    remove.onclick = () => {
      pictures = pictures.filter((_, other) => other !== number);
      showPictures();
      text.focus();
    };
    item.append(makeImage(url, `Picture ${number + 1}`), remove);
    return item;
  }));
}

async function addFiles(list) {
  const read = (file) => new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} can't be read.`));
    reader.readAsDataURL(file);
  });
  get("error").textContent = "";
  const own = conversations;
  setReading(list.length);
  const urls = await Promise.all([...list].map(read)).catch((error) => {
    get("error").textContent = error.message;
    return [];
  });
  setReading(-list.length);
  if (own !== conversations) return; // another one has begun
  pictures = [...pictures, ...urls];
  showPictures();
  text.focus();
}

function setReading(change) {
  reading += change;
  showAsk();
}

function showAsk() {
  get("ask").disabled = Boolean(request || reading);
}

async function send(path, options) {
  const headers = key.value ? { Authorization: `Bearer ${key.value}` } : {};
  const response = await fetch(path, { ...options, headers: { ...headers, ...options.headers } }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error(GONE);
  });
  if (response.ok) return response;
  get("access").hidden &&= response.status !== 401;
  const answer = await response.json().catch(() => null); // a proxy's page is none of ours
  throw new Error(answer?.error?.message ?? `The endpoint answers ${response.status}.`);
}

async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error(ENDED);
    });
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith("data: {")) yield JSON.parse(event.slice(6));
    }
  }
}

async function play(content, signal) {
  const models = await (await send("/v1/models", { signal })).json();
  const asked = [...messages, { role: "user", content }];
  // The last name is the one with which pictures of the turns come.
  const body = JSON.stringify({ model: models.data.at(-1).id, messages: asked, stream: true });
  const headers = { "Content-Type": "application/json" };
  const response = await send("/v1/chat/completions", { method: "POST", headers, body, signal });
  let [answer, turns] = ["", 0];
  for await (const event of readEvents(response)) {
    if (event.error) throw new Error(event.error.message);
    const [{ delta, finish_reason: reason }] = event.choices;
    if (delta.turn) showTurn(delta.turn, delta.images ?? [], ++turns);
    answer += delta.content ?? "";
    if (!reason) continue;
    showAnswer(answer, reason);
    messages = [...asked, { role: "assistant", content: answer }];
    return;
  }
  throw new Error(ENDED);
}

function setBusy(controller) {
  request = controller;
  get("status").textContent = controller ? "The policy is at work …" : "";
  showAsk();
  get("stop").hidden = controller === null;
}

async function ask() {
  const [question, urls] = [text.value.trim(), pictures];
  if (request || reading || (!question && !urls.length)) return;
  following = true;
  const first = showQuestion(question, urls);
  const content = [...urls.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: question }];
  [text.value, pictures] = ["", []];
  showPictures();
  get("error").textContent = "";
  const controller = new AbortController();
  setBusy(controller);
  try {
    await play(content, controller.signal);
  } catch (error) {
    if (request !== controller) return; // another conversation has begun
    // What was asked goes back, to be mended and asked again, before what was written since.
    while (first.nextSibling) first.nextSibling.remove();
    first.remove();
    text.value = [question, text.value].filter(Boolean).join("\n");
    pictures = [...urls, ...pictures];
    showPictures();
    get("error").textContent = error.name === "AbortError" ? "" : error.message;
  }
  if (request === controller) setBusy(null);
  text.focus();
}

function restart() {
  conversations += 1;
  request?.abort();
  setBusy(null);
  [messages, pictures, text.value] = [[], [], ""];
  log.replaceChildren();
  get("error").textContent = "";
  showPictures();
  text.focus();
}

log.onscroll = () => {
  following = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
};
form.onsubmit = (event) => {
  event.preventDefault();
  ask();
};
text.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
};
files.onchange = () => {
  addFiles([...files.files]);
  files.value = ""; // else the same file could not be chosen again
};
document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.add("over");
};
document.ondragleave = (event) => event.relatedTarget || document.body.classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  addFiles(event.dataTransfer.files);
};
get("stop").onclick = () => request?.abort();
get("restart").onclick = restart;
send("/v1/models", {}).catch((error) => {
  get("error").textContent = error.message;
});
text.focus();
