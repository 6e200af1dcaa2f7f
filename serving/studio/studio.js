// The page: what is asked, what comes, and what is told of it.
const HERE = location.origin + location.pathname.replace(/[^/]*$/, "");  // without the key that an address may carry
const ATTEMPTS = 20, PARTIALS = 3, DRAFT = "animesketch-draft";
const FIELDS = { prompt: "prompt", negative_prompt: "negative", adapter_scale: "alpha", guidance_scale: "guidance",
  num_inference_steps: "steps", size: "size", model: "model" };
let keyed = false, asked = [], running = null;

function $(id) { return document.getElementById(id); }
function tell(text, wrong = false) { $("told").textContent = text; $("told").classList.toggle("wrong", wrong); }
function picture(base64, format = "png") {
  const image = new Image();
  image.alt = ""; image.src = `data:image/${format};base64,${base64}`;
  return image;
}
function words(recipe) {
  const weight = recipe.image ? `sketch weight ${recipe.adapter_scale}, adapter ${recipe.model}` : "no sketch";
  return `${recipe.prompt}; ${weight}, guidance ${recipe.guidance_scale}, ${recipe.num_inference_steps} steps, seed ${recipe.seed}`;
}
function label(recipe) { return recipe.image ? recipe.model : "no sketch"; }

// ---- what is asked
function set(id, value) {
  const field = $(id);
  if (field.matches("select") && ![...field.options].some((option) => option.value === String(value))) return false;
  field.value = value; field.dispatchEvent(new Event("input", { bubbles: true }));
  return true;
}
for (const slider of document.querySelectorAll(".slider input")) {
  slider.addEventListener("input", () => { slider.parentElement.querySelector("output").value = slider.value; });
  set(slider.id, slider.value);
}
sheet.canvas.addEventListener("drawn", () => {
  $("alpha").disabled = !sheet.drawn();
  $("alpha").parentElement.classList.toggle("off", $("alpha").disabled);
  keepDraft();
});
function requests() {
  const body = { model: $("model").value || undefined, prompt: $("prompt").value };
  if ($("negative").value) body.negative_prompt = $("negative").value;
  body.n = Number($("count").value);
  if ($("size").value) body.size = $("size").value;
  body.num_inference_steps = $("steps").valueAsNumber; body.guidance_scale = $("guidance").valueAsNumber;
  body.seed = $("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : $("seed").valueAsNumber;
  if (!sheet.drawn()) return [body];
  const drawn = { ...body, adapter_scale: $("alpha").valueAsNumber, image: sheet.png() }, other = $("other").value;
  if (!other || other === body.model) return [drawn];
  return [drawn, other === "/none" ? body : { ...drawn, model: other }];
}

// ---- what the server answers
async function refusal(reply) {
  const told = (await reply.json().catch(() => null))?.error;
  if (reply.status === 401) return "The server does not take this key. Reload the page, and give a valid one as the password.";
  if (told?.code === "model_not_found") { models(); return `${told.message.split(":")[0]} any more. Pick another adapter.`; }
  return told?.message ?? `The server answered ${reply.status} ${reply.statusText}, without saying why. Try again later.`;
}
async function send(body, signal, waits) {
  for (let attempt = 1; ; attempt++) {
    const reply = await fetch(`${HERE}v1/images/generations`, {
      method: "POST", headers: { "Content-Type": "application/json" }, signal,
      body: JSON.stringify({ ...body, stream: true, partial_images: PARTIALS }),
    }).catch((error) => {
      throw signal.aborted ? error : new Error("The server does not answer. See that it runs and that you are connected, then try again.");
    });
    if (reply.ok) return reply;
    const message = await refusal(reply), wait = Number(reply.headers.get("Retry-After"));
    if (reply.status !== 429 || attempt === ATTEMPTS || !wait) throw new Error(message);
    await waits(message, wait);
  }
}
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));  // a comment says only that the server is there
    }
  }
}
function pause(seconds, signal) {
  return new Promise((yes, no) => {
    const timer = setTimeout(yes, 1000 * seconds);
    signal.addEventListener("abort", () => { clearTimeout(timer); no(signal.reason); }, { once: true });
  });
}

// ---- pictures
function figure(recipe) {
  const made = document.createElement("figure"), name = label(recipe), [width, height] = (recipe.size ?? "1x1").split("x");
  made.innerHTML = '<div class="frame"><div class="bar"></div></div><figcaption><b></b><span class="state" aria-hidden="true"></span>' +
    '<button type="button"></button><a>Save</a></figcaption>';
  $("stage").style.setProperty("--shape", width / height);
  made.dataset.seed = recipe.seed;
  const [frame, bar, save, keep] = [".frame", ".bar", "a", "button"].map((one) => made.querySelector(one));
  made.querySelector("b").textContent = name;
  keep.textContent = `seed ${recipe.seed}`; keep.title = "Use this seed again"; keep.ariaLabel = `Use seed ${recipe.seed} again`;
  keep.onclick = () => { set("seed", recipe.seed); tell(`Seed ${recipe.seed} is set: the next pictures start from the same noise.`); };
  save.hidden = true;
  const show = {
    element: made,
    state(state, text) { made.dataset.state = state; made.querySelector(".state").textContent = text; },
    get open() { return ["waiting", "partial"].includes(made.dataset.state); },
    async picture(base64, format, share) {
      const image = picture(base64, format);
      await image.decode();  // no flash of nothing between two previews
      image.alt = `${name}: ${words(recipe)}${share < 1 ? " (preview)" : ""}`;
      frame.replaceChildren(image, bar);
      bar.style.setProperty("--done", share);
      if (share < 1) return show.state("partial", `preview ${Math.round(share * (PARTIALS + 1))} of ${PARTIALS}`);
      show.state("done", "");
      save.hidden = false; save.href = image.src; save.download = `${code.title(recipe)}-${recipe.seed}.${format}`;
      save.ariaLabel = `Save ${save.download}`;
    },
    fail(text, state = "failed") {
      show.state(state, state);
      if (!frame.querySelector("img")) frame.replaceChildren(Object.assign(document.createElement("p"), { textContent: text }), bar);
    },
  };
  show.state("waiting", "waiting");
  return show;
}
function lay(figures, columns) {
  $("stage").dataset.columns = columns;
  $("stage").style.setProperty("--columns", columns);
  $("stage").replaceChildren(...figures.map((one) => one.element));
  $("elsewhere").hidden = false; $("code").hidden = true; $("note").textContent = "";
}
async function draw(body, figures, signal) {
  const warnings = new Set();
  try {
    const reply = await send(body, signal, async (message, wait) => {
      tell(`${message} This page does so by itself; Stop gives up.`);
      for (let left = wait; left > 0; left--) {
        for (const one of figures) one.state("waiting", `again in ${left} s`);
        await pause(1, signal);
      }
      tell("Asking again…");
    });
    for (const one of figures) one.state("waiting", "drawing");
    tell("Drawing…");
    for await (const event of events(reply)) {
      if (event.type === "error") throw new Error(event.error.message);
      const one = figures[event.seed - body.seed], done = event.type.endsWith("completed");
      await one.picture(event.b64_json, event.output_format, done ? 1 : (event.partial_image_index + 1) / (PARTIALS + 1));
      for (const warning of event.warnings ?? []) warnings.add(warning);
      if (done) past.add({ recipe: { ...body, seed: event.seed, n: 1 }, picture: event.b64_json });
    }
    if (figures.some((one) => one.open)) throw new TypeError("The answer ended too early.");
  } catch (error) {
    const text = error instanceof TypeError ? "The connection broke before the picture was done. Try again." : error.message;
    for (const one of figures) if (one.open) signal.aborted ? one.fail("Stopped.", "stopped") : one.fail(text);
    throw signal.aborted ? error : new Error(text);
  }
  return [...warnings];
}
$("form").onsubmit = async (event) => {
  event.preventDefault();
  if (running) return;
  asked = requests();
  running = new AbortController();
  const { signal } = running, begun = performance.now(), focused = document.activeElement === $("generate");
  const figures = asked.map((body) => Array.from({ length: body.n }, (_, i) => figure({ ...body, seed: body.seed + i })));
  lay(figures[0].flatMap((_, i) => figures.map((row) => row[i])), asked.length > 1 || asked[0].n > 1 ? 2 : 1);
  $("generate").hidden = true; $("stop").hidden = false; tell("Asking the server…");
  if (focused) $("stop").focus();
  if (matchMedia("(max-width: 60rem)").matches) $("stage").scrollIntoView({ block: "nearest", behavior: "smooth" });
  const ends = await Promise.allSettled(asked.map((body, i) => draw(body, figures[i], signal)));
  const wrong = ends.find((one) => one.reason)?.reason.message, warnings = new Set(ends.flatMap((one) => one.value ?? []));
  if (signal.aborted) tell("Stopped.");
  else if (wrong) tell(wrong, true);
  else {
    if ($("other").value && !asked[0].image) warnings.add("Nothing to compare: without a sketch, adapters have no say.");
    tell([`Done in ${((performance.now() - begun) / 1000).toFixed(1)} s.`, ...warnings].join(" "));
  }
  const again = document.activeElement === $("stop");
  running = null; $("generate").hidden = false; $("stop").hidden = true;
  if (again) $("generate").focus();
};
$("stop").onclick = () => running?.abort();
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("form").requestSubmit(); }
});

// A picture of the history: its sketch, its settings and itself.
async function again({ recipe, picture: base64 }) {
  if (running) { tell("A picture is being drawn: stop it first."); return; }
  const here = Object.entries(FIELDS).every(([name, id]) => set(id, recipe[name] ?? (name === "adapter_scale" ? $(id).value : "")));
  set("seed", recipe.seed); set("count", 1); set("other", "");
  await sheet.set(recipe.image);
  asked = [recipe];
  const one = figure(recipe);
  lay([one], 1);
  await one.picture(base64, "png", 1);
  if (here) tell("Its sketch and settings are here again: Generate gives the same picture.");
  else tell(`Its sketch and settings are here again, but the adapter ${recipe.model} is not on the server any more. Pick another.`, true);
}

// ---- the same elsewhere
for (const kind of ["curl", "python"]) {
  $(kind).onclick = async () => {
    const text = code[kind](asked), sketch = asked.find((body) => body.image)?.image;
    $("code").textContent = text; $("code").hidden = false;
    let note = "Copied. ";
    try { await navigator.clipboard.writeText(text); } catch { note = "Copy it from here: this browser lets no page copy over plain HTTP. "; }
    if (keyed) note += "It takes the key from ANIMESKETCH_KEY. ";
    $("note").textContent = note;
    if (sketch) {
      const link = Object.assign(document.createElement("a"), { download: "sketch.png", textContent: "Save the sketch" });
      link.href = `data:image/png;base64,${sketch}`;
      $("note").append("It reads sketch.png: ", link, ".");
    }
  };
}

// ---- the adapters, which come and go, and what was on the page when it was closed
function distinct() {
  for (const option of $("other").options) option.disabled = option.value === $("model").value;
  if ($("other").selectedOptions[0]?.disabled) $("other").value = "";
}
$("model").addEventListener("change", distinct);
async function models() {
  try {
    const reply = await fetch(`${HERE}v1/models`);
    if (!reply.ok) throw new Error(await refusal(reply));
    const { data } = await reply.json(), names = data.map((model) => model.id), [{ base, native_size, random_weights }] = data;
    for (const [select, first] of [[$("model"), []], [$("other"), [["nothing", ""], ["no sketch", "/none"]]]]) {
      const chosen = select.value;
      select.replaceChildren(...first.map((one) => new Option(...one)), ...names.map((name) => new Option(name, name)));
      if ([...select.options].some((option) => option.value === chosen)) select.value = chosen;
    }
    distinct();
    const [width, height] = native_size.split("x").map(Number), chosen = $("size").value;
    $("size").replaceChildren(new Option("square", ""), new Option("tall", `${width}x${height * 1.5}`), new Option("wide", `${width * 1.5}x${height}`));
    set("size", chosen);
    $("server").textContent = `${base}, ${native_size.replace("x", " × ")} px` + (random_weights ? ": random weights, pictures are noise" : "");
    return base;
  } catch (error) {
    tell(error instanceof TypeError ? "The server does not answer. See that it runs, then reload this page." : error.message, true);
    return null;
  }
}
let draftTimer = 0;
function keepDraft() {
  clearTimeout(draftTimer);
  draftTimer = setTimeout(() => {
    const fields = Object.fromEntries([...Object.values(FIELDS), "seed", "count", "width", "other"].map((id) => [id, $(id).value]));
    try { localStorage.setItem(DRAFT, JSON.stringify({ fields, sketch: sheet.drawn() ? sheet.png() : null })); } catch { /* as below */ }
  }, 300);
}
(async () => {
  const base = await models();
  let draft = null;
  try { draft = JSON.parse(localStorage.getItem(DRAFT)); } catch { /* a browser may refuse: the draft is a courtesy */ }
  for (const [id, value] of Object.entries(draft?.fields ?? {})) set(id, value);
  if (draft?.sketch) await sheet.set(draft.sketch);
  else sheet.canvas.dispatchEvent(new Event("drawn"));
  if (!draft && GUIDANCE[base]) set("guidance", GUIDANCE[base]);
  $("form").addEventListener("input", keepDraft);
  addEventListener("focus", () => running || models());
  keyed = (await fetch(`${HERE}v1/models`, { credentials: "omit" }).catch(() => null))?.status === 401;
})();
