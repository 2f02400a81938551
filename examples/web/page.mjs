// The page and, started again by it as a worker, the model: what computes must not hold up what is shown.
// Messages to the worker: {load: settings} and {ask: {picture, question, newTokens}}.
// Messages from it: {loaded: bytes}, {ready}, {piece}, {done: {text, tokens, firstAfter, after}}, {failed}.

const $ = (id) => document.getElementById(id);
// What the page knows: of the server, the worker and what it can do, the picture, and a question asked before it can.
const state = {
  settings: null, worker: null, ready: false, broken: "", busy: false, picture: null, chosen: null, waiting: null,
};

if (typeof document === "undefined") work();
else show();

// --- the model, in the worker -----------------------------------------------------------------------------------------

async function work() {
  let answer; // what `opened` returns
  onmessage = async ({ data }) => {
    try {
      if (data.load) {
        answer = await opened(data.load);
        postMessage({ ready: true });
      } else {
        postMessage({ done: await answer(data.ask) });
      }
    } catch (error) {
      const reason = missing
        ? `the server did not send ${missing}.`
        : String(error?.message ?? error).split("\n")[0].replace(/\.?$/, ".");
      postMessage({ failed: `The model does not ${data.load ? "load" : "answer"}: ${reason}` });
    }
  };
}

// Opens a folder of the layout transformers.js; returns the function that answers a question.
async function opened({ client, wasm, folders, folder, dtype }) {
  const { AutoModelForImageTextToText, AutoProcessor, env, RawImage, TextStreamer } = await import(client);
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = folders;
  env.useBrowserCache = env.useWasmCache = false; // a folder that was exported again has the same addresses
  env.fetch = counting;
  env.backends.onnx.wasm.wasmPaths = wasm;
  const processor = await AutoProcessor.from_pretrained(folder);
  const model = await AutoModelForImageTextToText.from_pretrained(folder, { dtype, device: "wasm" });

  return async ({ picture, question, newTokens }) => {
    const start = performance.now();
    const image = (await RawImage.fromBlob(picture)).rgb();
    const inputs = await prompt(processor, image, question);
    const tokens = [];
    let firstAfter = null;
    const streamer = new TextStreamer(processor.tokenizer, {
      skip_prompt: true,
      token_callback_function: (ids) => {
        firstAfter ??= performance.now() - start;
        tokens.push(...ids.map(Number));
      },
      callback_function: (piece) => postMessage({ piece }),
    });
    const output = await model.generate({ ...inputs, max_new_tokens: newTokens, do_sample: false, streamer });
    const answer = output.slice(null, [inputs.input_ids.dims.at(-1), null]);
    const text = processor.batch_decode(answer, { skip_special_tokens: true })[0];
    return { text, tokens, firstAfter, after: performance.now() - start };
  };
}

async function prompt(processor, image, question) {
  const content = [{ type: "image" }, { type: "text", text: question }];
  const text = processor.tokenizer.config.chat_template
    ? processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true })
    : "<image>" + question;
  const begin = processor.tokenizer.bos_token; // a template may have written it already
  const options = { add_special_tokens: !(begin && text.startsWith(begin)) };
  // Some of the client's processors take the picture first, others the text.
  const pictureFirst = ["LlavaProcessor", "PaliGemmaProcessor", "PixtralProcessor"];
  return pictureFirst.includes(processor.image_processor.config.processor_class)
    ? processor(image, text, options)
    : processor(text, image, options);
}

let missing = ""; // a graph that did not come

// Fetches as the browser does, and tells the page how much has come.
async function counting(url, options) {
  const response = await fetch(url, options).catch(() => Response.error());
  if (!response.ok && String(url).includes("/onnx/")) missing ||= String(url).split("/").at(-1);
  if (!response.ok || !response.body) return response;
  const count = new TransformStream({
    transform(chunk, controller) {
      postMessage({ loaded: chunk.byteLength });
      controller.enqueue(chunk);
    },
  });
  const { status, headers } = response;
  return new Response(response.body.pipeThrough(count), { status, headers });
}

// --- the page ---------------------------------------------------------------------------------------------------------

async function show() {
  listen();
  try {
    state.settings = await (await fetch("settings.json")).json();
  } catch {
    return stop("The server does not answer: start examples/web/serve.py, and load this page again.");
  }
  const { title, bytes } = state.settings;
  $("model").textContent = title;
  for (const dtype of Object.keys(bytes)) $("dtype").add(new Option(dtype, dtype));
  const wanted = new URLSearchParams(location.search).get("dtype");
  if (Object.hasOwn(bytes, wanted)) $("dtype").value = wanted;
  $("chooser").hidden = $("dtype").length < 2;
  $("dtype").onchange = load;
  load();
}

function listen() {
  $("form").onsubmit = (event) => {
    event.preventDefault();
    ask();
  };
  $("question").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  };
  $("file").onchange = () => {
    choose($("file").files[0]);
    $("file").value = ""; // the same file may be chosen again
  };
  addEventListener("paste", (event) => choose(event.clipboardData.files[0]));
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      event.preventDefault(); // anywhere: the browser would leave the page and open the file
      $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") choose(event.dataTransfer.files[0]);
    });
  }
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

// Ends what runs; `broken` says why nothing can be asked any more.
function stop(broken) {
  state.broken = broken;
  $("loading").hidden = true;
  setBusy(false);
  fail(broken);
}

function setBusy(busy) {
  state.busy = busy;
  $("ask").setAttribute("aria-disabled", String(busy));
  $("text").classList.toggle("writing", busy);
}

// Starts a worker with the precision that is chosen.
function load() {
  const dtype = $("dtype").value;
  state.worker?.terminate();
  const worker = new Worker(import.meta.url, { type: "module" });
  Object.assign(state, { worker, ready: false, broken: "", waiting: null });
  const progress = { loaded: 0, total: state.settings.bytes[dtype] };
  worker.onmessage = ({ data }) => hear(data, progress);
  worker.onerror = () => stop("The model does not start: this browser has no module workers, or no WebAssembly.");
  setBusy(false);
  fail("");
  $("loading").hidden = false;
  $("stage").textContent = "Loading the model …";
  $("progress").removeAttribute("value");
  worker.postMessage({ load: { ...state.settings, dtype } });
}

function hear(data, progress) {
  if (data.loaded) {
    progress.loaded = Math.min(progress.loaded + data.loaded, progress.total);
    const { loaded, total } = progress;
    if (loaded < total) {
      $("progress").value = loaded / total;
      $("stage").textContent = `Loading the model: ${megabytes(loaded)} of ${megabytes(total)}`;
    } else {
      $("progress").removeAttribute("value");
      $("stage").textContent = "Starting the model …";
    }
  } else if (data.ready) {
    state.ready = true;
    $("loading").hidden = true;
    if (state.waiting) state.worker.postMessage(state.waiting);
  } else if (data.piece) {
    $("text").textContent += data.piece;
  } else if (data.done) {
    finish(data.done);
  } else if (data.failed) {
    stop(data.failed);
    if (state.ready) state.broken = ""; // another question may do better
  }
}

function finish({ text, tokens, firstAfter, after }) {
  setBusy(false);
  $("text").textContent = text;
  const count = tokens.length === 1 ? "1 token" : `${tokens.length} tokens`;
  $("time").textContent = `${count} in ${duration(after)}, the first after ${duration(firstAfter)}`;
  $("answer").dataset.tokens = JSON.stringify(tokens); // for those who compare answers
}

async function choose(file) {
  if (!file) return;
  state.chosen = file;
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (state.chosen !== file) return; // another one was chosen while this one was read
  if (!bitmap) {
    return fail(`${file.name} is no picture that this browser reads: choose a PNG, JPEG or WebP file.`);
  }
  fail(state.broken);
  state.picture = file;
  if ($("picture").src) URL.revokeObjectURL($("picture").src);
  $("picture").src = URL.createObjectURL(file);
  $("picture").classList.toggle("small", Math.max(bitmap.width, bitmap.height) < 200);
  $("picture").hidden = false;
  $("hint").hidden = true;
  $("drop").classList.add("filled");
  $("name").textContent = `${file.name}, ${bitmap.width} × ${bitmap.height} pixels`;
}

function ask() {
  if (state.busy) return;
  const question = $("question").value.trim();
  if (state.broken) return fail(state.broken);
  if (!state.picture) return fail("Choose a picture first.");
  if (!question) {
    $("question").focus();
    return fail("Write a question first.");
  }
  fail("");
  setBusy(true);
  delete $("answer").dataset.tokens;
  $("label").textContent = question;
  $("text").textContent = $("time").textContent = "";
  const message = { ask: { picture: state.picture, question, newTokens: state.settings.newTokens } };
  if (state.ready) state.worker.postMessage(message);
  else state.waiting = message; // asked as soon as the model is there
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const duration = (time) => (time < 1000 ? `${Math.round(time)} ms` : `${(time / 1000).toFixed(1)} s`);
