#include "serve/page.h"

namespace fathom::serve {

namespace {

constexpr const char* kPage = R"html(<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Fathom</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#c8ccd2, #454b54); --deep: light-dark(#1f5fa8, #7db3f0);
  --soft: light-dark(#f3f5f8, #20242a); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0 0 1rem; }
h1, #answer, #status, #here { overflow-wrap: anywhere; }
label { display: block; } [hidden] { display: none !important; }
textarea, input { font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--line);
  border-radius: 4px; padding: .4rem; box-sizing: border-box; }
textarea { width: 100%; min-height: 6rem; }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem; margin: .6rem 0; }
.numbers label { max-width: 100%; }
.numbers input { width: 6rem; max-width: 100%; display: block; }
#keys input { width: 14rem; }
button { font: inherit; padding: .4rem 1.2rem; }
#answer { white-space: pre-wrap; border: 1px solid var(--line); border-radius: 4px;
  padding: .6rem; min-height: 6rem; margin: 1rem 0 .4rem; }
#answer .prompt { opacity: .6; }
#status { min-height: 1.5rem; }
#status.bad { color: light-dark(#a01818, #ff9a9a); }
#routing { margin: .6rem 0; } #routing figcaption { display: flex; gap: 1rem; flex-wrap: wrap; }
#strip { overflow-x: auto; border: 1px solid var(--line); border-radius: 4px; }
#strip canvas { display: block; color: var(--deep); background: var(--soft); }
#depth { display: grid; grid-template-columns: auto 1fr auto; gap: .2rem .6rem; align-items: center; }
#depth .bar { background: var(--soft); height: .8rem; } #depth .bar i { display: block; height: 100%; background: var(--deep); }
</style>
<h1>Fathom <span id="model"></span></h1>
<form id="form">
  <label for="prompt">Text to go on from</label>
  <textarea id="prompt" autofocus spellcheck="false">The sea</textarea>
  <div class="numbers">
    <label>New tokens <input id="tokens" type="number" min="1" value="100"></label>
    <label>Temperature <input id="temperature" type="number" min="0" max="100" step="0.1" value="0.8"></label>
    <label id="dial" hidden>Routing threshold <input id="threshold" type="number" step="0.01" placeholder="usual"></label>
    <label id="keys" hidden>API key <input id="key" type="password" autocomplete="off"></label>
  </div>
  <button id="go">Write</button> <button id="stop" type="button" disabled>Stop</button>
  <small>Ctrl+Enter writes, Escape stops</small>
</form>
<div id="answer" aria-live="off" tabindex="0" aria-label="Answer"></div>
<div id="status" role="status"></div>
<figure id="routing" hidden>
  <figcaption><span>Depth by token and layer</span><span id="here"></span></figcaption>
  <div id="strip" tabindex="0" role="img" aria-label="Depth by token and layer"><canvas></canvas></div>
</figure>
<div id="depth"></div>
<script>
const $ = id => document.getElementById(id);
let going = null;
const headers = () => $("key").value ? {"Authorization": "Bearer " + $("key").value} : {};
function say(text, bad) { $("status").textContent = text; $("status").className = bad ? "bad" : ""; }
function refused(status, text) {
  if (status == 401) { $("keys").hidden = false; $("key").focus(); }
  try { text = JSON.parse(text).error.message; } catch (e) {}
  say(text || "HTTP " + status, true);
}
async function name() {
  const r = await fetch("v1/models", {headers: headers()});
  if (!r.ok) return refused(r.status, await r.text());
  const model = (await r.json()).data[0];
  $("model").textContent = "· " + model.id;
  $("dial").hidden = !model.routing;
  if (model.routing) { $("threshold").min = model.routing.min_threshold; $("threshold").max = model.routing.max_threshold; }
}
// A column a token, a row a layer, the first layer below; the prompt is paler.
const strip = {layers: [], kept: [], prompt: 0, at: -1, cell: 8, tall: 12, drawn: 0}, widest = 30000;
function draw(all, ended) {
  const canvas = $("strip").firstElementChild, rows = strip.layers.length, tall = strip.tall;
  const count = strip.kept.length, scale = devicePixelRatio || 1;
  // Room is taken ahead, as a canvas that changes its size is empty, and as much as a canvas may have.
  if (all || canvas.width < Math.min(widest, count * strip.cell) * scale) {
    strip.cell = Math.max(1, Math.min(8, Math.floor(widest / 2 / count)));
    const room = Math.min(widest, ended ? count * strip.cell : Math.max(256, 2 * count * strip.cell));
    canvas.width = room * scale; canvas.height = rows * tall * scale;
    canvas.style.height = rows * tall + "px"; canvas.style.width = room + "px";
    strip.drawn = 0;
  }
  const c = strip.cell, gap = c > 2 ? 1 : 0;
  const g = canvas.getContext("2d");
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.fillStyle = getComputedStyle(canvas).color;
  for (; strip.drawn < strip.kept.length; ++strip.drawn) {
    const token = strip.kept[strip.drawn];
    g.globalAlpha = strip.drawn < strip.prompt ? .45 : 1;
    for (let l = 0; l < rows; ++l) if (token[l] == "1") g.fillRect(strip.drawn * c, (rows - 1 - l) * tall, c - gap, tall - 1);
  }
}
function show(routing) {
  if (!routing.layers.length || !routing.kept.length) return;
  if (!strip.kept.length) { strip.layers = routing.layers; strip.prompt = routing.kept.length; $("routing").hidden = false; }
  const first = !strip.kept.length, box = $("strip"), at_end = box.scrollLeft + box.clientWidth >= box.dataset.end - 40;
  strip.kept.push(...routing.kept);
  draw(first);
  box.dataset.end = strip.kept.length * strip.cell;
  if (first || at_end) box.scrollLeft = box.dataset.end - box.clientWidth + 2;
}
function forget() {
  strip.kept = []; strip.at = -1; strip.drawn = 0; $("routing").hidden = true; $("here").textContent = "";
  $("strip").dataset.end = 0;
}
function point(token) {
  if (!strip.kept.length) return;
  strip.at = Math.min(strip.kept.length - 1, Math.max(0, token));
  const through = strip.layers.filter((l, i) => strip.kept[strip.at][i] == "1");
  $("here").textContent = (strip.at < strip.prompt ? "token " + (strip.at + 1) + " of the text to go on from"
    : "new token " + (strip.at - strip.prompt + 1)) + ": " + (through.length ? "layer " + through.join(", ") : "no routed layer");
}
function depth(usage) {
  $("depth").replaceChildren();
  if (!usage || !usage.routed_layers) return;
  usage.routed_layers.forEach((layer, i) => {
    const share = usage.routed_fraction_by_layer[i], bar = document.createElement("div"), fill = document.createElement("i");
    const label = document.createElement("span"), value = document.createElement("span");
    label.textContent = "layer " + layer;
    value.textContent = (100 * share).toFixed(0) + " % of the tokens";
    bar.className = "bar"; fill.style.width = 100 * share + "%"; bar.append(fill);
    $("depth").append(label, bar, value);
  });
}
async function write() {
  if (going) return;
  going = new AbortController();
  $("go").disabled = true; $("stop").disabled = false;
  depth(null); forget(); say("…");
  const prompt = document.createElement("span");
  prompt.className = "prompt"; prompt.textContent = $("prompt").value;
  const answer = document.createTextNode("");
  $("answer").replaceChildren(prompt, answer);
  const begun = performance.now();
  let first = 0, pieces = 0, usage = null;
  const rate = () => first ? pieces + " pieces, " + (1000 * pieces / Math.max(1, performance.now() - begun)).toFixed(0) +
    " a second, the first after " + (first - begun).toFixed(0) + " ms" : "";
  try {
    const r = await fetch("v1/completions", {method: "POST", signal: going.signal, headers: headers(),
      body: JSON.stringify({prompt: $("prompt").value, max_tokens: +$("tokens").value,
        temperature: +$("temperature").value, stream: true, return_routing: true,
        routing_threshold: $("dial").hidden || !$("threshold").value ? null : +$("threshold").value, stream_options: {include_usage: true}})});
    if (!r.ok) { refused(r.status, await r.text()); return; }
    const reader = r.body.pipeThrough(new TextDecoderStream()).getReader();
    let left = "", failed = "";
    for (;;) {
      const {value, done} = await reader.read();
      if (done) break;
      left += value;
      for (let end; (end = left.indexOf("\n\n")) >= 0; left = left.slice(end + 2)) {
        const data = left.slice(6, end);
        if (data == "[DONE]") continue;
        const event = JSON.parse(data);
        if (event.error) { failed = event.error.message; continue; }
        if (event.usage) usage = event.usage;
        if (event.choices.length && event.choices[0].routing) show(event.choices[0].routing);
        if (!event.choices.length || !event.choices[0].text) continue;
        first = first || performance.now();
        ++pieces;
        answer.data += event.choices[0].text;
      }
      say(rate());
    }
    say(failed || rate() + (usage ? "; " + usage.completion_tokens + " tokens" : ""), failed);
    depth(usage);
  } catch (e) {
    say(e.name == "AbortError" ? "Stopped. " + rate() : "The server has gone: " + e.message, e.name != "AbortError");
  } finally {
    if (strip.kept.length) draw(true, true);
    going = null; $("go").disabled = false; $("stop").disabled = true;
  }
}
function stop() { if (going) going.abort(); }
$("form").addEventListener("submit", e => { e.preventDefault(); write(); });
$("stop").addEventListener("click", stop);
$("key").addEventListener("change", name);
$("strip").addEventListener("mousemove", e => point(Math.floor(e.offsetX / strip.cell)));
$("strip").addEventListener("keydown", e => {
  if (e.key != "ArrowLeft" && e.key != "ArrowRight") return;
  e.preventDefault();
  point(strip.at + (e.key == "ArrowRight" ? 1 : -1));
  $("strip").scrollLeft = strip.at * strip.cell - $("strip").clientWidth / 2;
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (strip.kept.length) draw(true, !going); });
document.addEventListener("keydown", e => {
  if (e.key == "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); write(); }
  if (e.key == "Escape") stop();
});
name();
</script>
</html>
)html";

}  // namespace

HttpReply page_reply() {
  return {.content_type = "text/html; charset=utf-8",
          .body = kPage,
          .headers = {{"Content-Security-Policy",
                       "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
                       "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"},
                      {"X-Content-Type-Options", "nosniff"},
                      {"Cache-Control", "no-cache"}}};
}

}  // namespace fathom::serve
