// Search, comparison, map and feedback. Every text goes through textContent: nothing that is found is ever markup.
const find = (id) => document.getElementById(id);
const copy = (id) => find(id).content.firstElementChild.cloneNode(true);
// Okabe and Ito's colours: told apart by colour-blind readers too.
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6d1f", "#7a7a7a"];
let asked = 0;

async function call(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(path, options);
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error.message);
  return found;
}

function say(text, wrong = false) {
  find("status").textContent = text;
  find("status").classList.toggle("wrong", wrong);
}

// ---- search

async function search(event) {
  event?.preventDefault();
  const query = find("query").value.trim();
  if (!query) return;
  const mine = ++asked;
  say("Searching…");
  const where = {};
  for (const input of document.querySelectorAll("#filters select")) if (input.value) where[input.name] = input.value;
  try {
    const found = await call("search", { query, top: Number(find("top").value), mode: find("mode").value, where });
    if (mine !== asked) return; // a later search has been started
    show(query, found);
  } catch (error) {
    if (mine === asked) say(error.message, true);
  }
}

function show(query, found) {
  const box = find("results");
  box.replaceChildren(...found.results.map((one) => column(query, one, found.results.length > 1)));
  const hits = found.results[0].hits.length;
  say(hits ? `${hits} ${hits === 1 ? "text" : "texts"} in ${Math.round(found.seconds * 1000)} ms` : "Nothing was found.");
  draw(new Set(found.results.flatMap((one) => one.hits.map((hit) => hit.id))));
}

function column(query, result, several) {
  const made = copy("column");
  made.querySelector("h2").textContent = several ? result.model : "";
  made.querySelector("h2").hidden = !several;
  made.setAttribute("aria-label", `Results of ${result.model}`);
  made.querySelector("ol").append(...result.hits.map((hit) => card(query, hit, result.model)));
  return made;
}

function card(query, hit, model) {
  const made = copy("hit");
  made.querySelector(".score").textContent = hit.score.toFixed(3);
  made.querySelector(".id").textContent = hit.id;
  const moved = made.querySelector(".moved");
  if (hit.new || hit.moved > 0) moved.classList.add("up");
  if (hit.moved < 0) moved.classList.add("down");
  if (hit.new) moved.textContent = "▲ new";
  else if (hit.moved !== null)
    moved.textContent = hit.moved === 0 ? "same place" : hit.moved > 0 ? `▲ ${hit.moved} up` : `▼ ${-hit.moved} down`;
  const [first, last] = hit.passage;
  const letters = Array.from(hit.text); // the server counts characters, a string here counts halves of some
  const text = made.querySelector(".text");
  const mark = document.createElement("mark");
  mark.textContent = letters.slice(first, last).join("");
  // What stands before the best passage is shortened, so that the passage is in sight.
  const before = letters.slice(0, first).join("");
  text.append(before.length > 160 ? `… ${before.slice(-120)}` : before, mark, letters.slice(last).join(""));
  made.querySelector(".columns").textContent = Object.entries(hit.columns).map(([k, v]) => `${k}: ${v}`).join(" · ");
  for (const button of made.querySelectorAll(".votes button")) {
    const verdict = button.dataset.verdict;
    button.setAttribute("aria-label", `${verdict === "up" ? "Fits" : "Does not fit"}: ${hit.text.slice(0, 60)}`);
    button.addEventListener("click", () => vote(made, { query, id: hit.id, model, verdict }));
  }
  return made;
}

async function vote(card, body) {
  try {
    await call("feedback", body);
    for (const button of card.querySelectorAll(".votes button"))
      button.setAttribute("aria-pressed", String(button.dataset.verdict === body.verdict));
    say("Thank you: your answer is kept for the next training.");
  } catch (error) {
    say(error.message, true);
  }
}

// ---- map

const atlas = { points: [], groups: [], hits: new Set(), at: -1, spots: [] };

async function loadMap() {
  const found = await call("map");
  if (found.points.length < 3) return;
  atlas.points = found.points;
  find("atlas").hidden = false;
  const part = found.points.length < found.total ? `${found.points.length.toLocaleString()} of ` : "";
  find("atlas-about").textContent =
    `${part}${found.total.toLocaleString()} texts by their two main directions, which hold ` +
    `${Math.round(found.explained * 100)} % of what tells them apart: near is alike, far may be alike too.`;
  for (const name of found.columns) find("colour").add(new Option(name));
  colour();
  new ResizeObserver(() => draw()).observe(find("canvas-box"));
}

function colour() {
  const name = find("colour").value;
  const count = new Map();
  for (const point of atlas.points) count.set(String(point.columns[name]), (count.get(String(point.columns[name])) ?? 0) + 1);
  atlas.groups = [...count].sort((a, b) => b[1] - a[1]).slice(0, COLOURS.length - 1).map(([value]) => value);
  find("legend").replaceChildren(...atlas.groups.concat(count.size > atlas.groups.length ? ["other"] : []).map((value, i) => {
    const item = document.createElement("li");
    const dot = document.createElement("i");
    dot.style.background = COLOURS[i];
    item.append(dot, value.slice(0, 40));
    return item;
  }));
  draw();
}

function draw(hits) {
  if (hits) atlas.hits = hits;
  const canvas = find("canvas");
  const box = canvas.getBoundingClientRect();
  if (!atlas.points.length || !box.width) return;
  const scale = devicePixelRatio || 1;
  canvas.width = box.width * scale;
  canvas.height = box.height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const name = find("colour").value;
  const words = find("find").value.trim().toLowerCase();
  const ink = getComputedStyle(document.body).color;
  atlas.spots = atlas.points.map((point) => [14 + point.x * (box.width - 28), 14 + point.y * (box.height - 28)]);
  const ring = [];
  atlas.points.forEach((point, i) => {
    const group = atlas.groups.indexOf(String(point.columns[name]));
    const marked = words && point.text.toLowerCase().includes(words);
    pen.globalAlpha = words && !marked ? 0.15 : 0.75;
    pen.fillStyle = COLOURS[group < 0 ? COLOURS.length - 1 : group];
    pen.beginPath();
    pen.arc(...atlas.spots[i], marked ? 5 : 3, 0, 7);
    pen.fill();
    if (atlas.hits.has(point.id) || i === atlas.at) ring.push(i);
  });
  pen.globalAlpha = 1;
  pen.strokeStyle = ink;
  pen.lineWidth = 2;
  for (const i of ring) {
    pen.beginPath();
    pen.arc(...atlas.spots[i], i === atlas.at ? 8 : 6, 0, 7);
    pen.stroke();
  }
}

function point(i) {
  if (i === atlas.at || i < 0) return;
  atlas.at = i;
  const { id, text, columns } = atlas.points[i];
  const about = Object.entries(columns).map(([k, v]) => `${k}: ${v}`).join(" · ");
  find("point").textContent = `${id}: ${text}${about ? ` (${about})` : ""}`;
  draw();
}

function nearest(x, y, least = 20) {
  let best = -1;
  atlas.spots.forEach(([a, b], i) => {
    const far = Math.hypot(a - x, b - y);
    if (far < least) [best, least] = [i, far];
  });
  return best;
}

function step(event) {
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
  if (!dx && !dy) return;
  event.preventDefault();
  const [x, y] = atlas.spots[Math.max(0, atlas.at)];
  let [best, least] = [-1, Infinity];
  atlas.spots.forEach(([a, b], i) => {
    const along = (a - x) * dx + (b - y) * dy;
    const aside = Math.abs((a - x) * dy) + Math.abs((b - y) * dx);
    if (i !== atlas.at && along > 0 && along + 2 * aside < least) [best, least] = [i, along + 2 * aside];
  });
  point(best);
}

// ---- start

async function start() {
  const about = await call("about");
  find("about").textContent =
    `${about.texts.toLocaleString()} texts · ${about.models.join(" beside ")}${about.lexical ? "" : " · by meaning only"}`;
  for (const option of find("mode").options) option.disabled = !about.lexical && option.value !== "dense";
  find("filters").replaceChildren(...Object.entries(about.filters).flatMap(([name, values]) => {
    const label = document.createElement("label");
    const select = document.createElement("select");
    select.id = select.name = name;
    label.htmlFor = name;
    label.textContent = name;
    select.append(new Option("any", ""), ...values.map((value) => new Option(value.slice(0, 60), value)));
    select.addEventListener("change", search);
    return [label, select];
  }));
  await loadMap();
}

find("search").addEventListener("submit", search);
for (const id of ["mode", "top"]) find(id).addEventListener("change", search);
find("colour").addEventListener("change", colour);
find("find").addEventListener("input", () => draw());
find("results").addEventListener("click", (event) => event.target.closest(".text")?.classList.add("whole"));
find("canvas").addEventListener("mousemove", (event) => point(nearest(event.offsetX, event.offsetY)));
find("canvas").addEventListener("click", (event) => point(nearest(event.offsetX, event.offsetY)));
find("canvas").addEventListener("keydown", step);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
start().catch((error) => say(error.message, true));
