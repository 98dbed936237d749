/* The tools of the report: sorted tables, the search over selected rows, charts and the map.
   The page reads without them. Texts of data are put in by textContent, or by libraries that escape them. */
"use strict";

const MISSING = "–";
const read = {};
const dataOf = (anchor) => (read[anchor] ??= JSON.parse(document.getElementById(`data-${anchor}`).textContent));
const element = (name, text, className = "") =>
  Object.assign(document.createElement(name), { textContent: text, className });

/* ---- sorted tables ---- */

// The number that a cell begins with: "0.512 ± 0.031", "−1,234", "1.95×". What is missing comes last.
function numberOf(text) {
  const number = parseFloat(text.replaceAll("−", "-").replaceAll(",", ""));
  return Number.isNaN(number) ? -Infinity : number;
}

function sortTables() {
  Tablesort.extend("figures", () => false, (a, b) => numberOf(b) - numberOf(a) || 0); // descending, as the library's own
  for (const table of document.querySelectorAll("main table")) {
    if (!table.tHead) continue;
    for (const head of table.tHead.rows[0].cells) {
      if (head.classList.contains("number")) head.dataset.sortMethod = "figures";
    }
    new Tablesort(table, { descending: true });
  }
}

/* ---- selected rows ---- */

// Ids of the rows that are unfolded: Tabulator makes a cell anew whenever it lays out its table.
const unfolded = new Set();

function rowText(cell) {
  const row = cell.getData();
  const box = element("details", "");
  box.open = unfolded.has(row.id);
  const summary = element("summary", row.p.slice(0, 160) || MISSING);
  summary.dir = "auto";
  box.append(summary);
  for (const [label, text] of [["prompt", row.p], ["completion", row.c], ["source", row.s], ["id", row.id]]) {
    const shown = element(label === "source" || label === "id" ? "div" : "pre", text, label === "id" ? "mono" : label);
    shown.dir = "auto";
    box.append(element("div", label, "label"), shown);
  }
  box.addEventListener("toggle", () => {
    if (box.open) unfolded.add(row.id);
    else unfolded.delete(row.id);
    cell.getRow().normalizeHeight();
  });
  return box;
}

const scoreText = (cell) => (cell.getValue() === null ? MISSING : cell.getValue().toFixed(4).replace("-", "−"));

// The rows to choose from: those that the first strategy took; beside a second one those of both, or of one alone.
function rowsBeside(rows, first, second, which) {
  const wanted = {
    first: (row) => row.t[first],
    both: (row) => row.t[first] && row.t[second],
    "only-first": (row) => row.t[first] && !row.t[second],
    "only-second": (row) => row.t[second] && !row.t[first],
  }[second ? which : "first"];
  return rows.filter(wanted).map((row) => {
    const [rank, score] = row.t[first] ?? [null, null];
    return { ...row, rank, score, beside: row.t[second]?.[0] ?? null };
  });
}

function fits(row, asked) {
  const atLeast = (value, bound) => bound === "" || (value !== null && value >= Number(bound));
  const atMost = (value, bound) => bound === "" || (value !== null && value <= Number(bound));
  const text = `${row.p}\n${row.c}`.toLowerCase();
  return (
    asked.words.toLowerCase().split(/\s+/).every((word) => text.includes(word)) &&
    (asked.source === "" || row.s === asked.source) &&
    atLeast(row.n, asked.shortest) && atMost(row.n, asked.longest) &&
    atLeast(row.score, asked.lowest ?? "") && atMost(row.score, asked.highest ?? "")
  );
}

function explore(box) {
  const rows = dataOf(box.dataset.explorer).rows;
  const form = box.querySelector("form");
  box.hidden = false;
  const empty = { sorterParams: { alignEmptyValues: "bottom" }, sorter: "number", hozAlign: "right" };
  const table = new Tabulator(box.querySelector(".grid"), {
    layout: "fitColumns",
    autoResize: false, // or a row that unfolds would lose the focus; windows are seen to below
    responsiveLayout: "hide",
    pagination: true,
    paginationElement: box.querySelector(".pages"), // a grid may hold rows alone
    paginationSize: 25,
    paginationSizeSelector: [25, 100, 500],
    placeholder: "No row fits.",
    initialSort: [{ column: "rank", dir: "asc" }],
    columns: [
      { title: "rank", field: "rank", width: 70, responsive: 0, ...empty },
      { title: "score", field: "score", width: 90, responsive: 2, formatter: scoreText, ...empty },
      { title: "rank beside", field: "beside", width: 130, responsive: 1, ...empty },
      { title: "source", field: "s", width: 130, responsive: 4 },
      { title: "tokens", field: "n", width: 95, responsive: 3, ...empty },
      { title: "row", field: "p", minWidth: 180, responsive: 0, formatter: rowText },
    ],
  });
  const show = async () => {
    const asked = Object.fromEntries(new FormData(form));
    form.elements.which.disabled = !asked.second;
    const chosen = rowsBeside(rows, asked.first, asked.second, asked.which);
    const found = chosen.filter((row) => fits(row, asked));
    box.querySelector(".found").textContent =
      `${found.length.toLocaleString("en")} of ${chosen.length.toLocaleString("en")} rows`;
    await table.setData(found);
    for (const [name, seen] of [["beside", asked.second], ["score", found.some((row) => row.score !== null)]]) {
      if (seen) table.showColumn(name);
      else table.hideColumn(name);
    }
    table.redraw(true); // gives the room of what was hidden to the others
  };
  table.on("tableBuilt", () => {
    box.querySelector(".tabulator-tableholder").removeAttribute("tabindex"); // it never scrolls
    show();
  });
  addEventListener("resize", () => table.redraw(true));
  form.addEventListener("input", show);
  form.addEventListener("reset", () => setTimeout(show));
  form.addEventListener("submit", (event) => event.preventDefault());
}

/* ---- charts ---- */

const COLOURS = ["#7c63f0", "#17a398", "#e08a1e", "#8c97a6", "#d1477d", "#3a86d8", "#7aa52c", "#a0693a", "#b35fd0",
  "#1fa5c4", "#c9a227"];
const OF_STRATEGIES = { prism: 0, uniform: 1, less: 2, random: 3 };
const colour = (name, place) => COLOURS[OF_STRATEGIES[name] ?? (place + 4) % COLOURS.length];
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const drawn = [];

function axis(more = {}) {
  return { grid: { color: style("--line") }, ticks: { color: style("--ink") }, ...more };
}

const KINDS = {
  means: (chart) => ({
    data: {
      labels: chart.labels,
      datasets: [
        { type: "scatter", label: "mean", pointRadius: 5, data: chart.means.map((x, at) => ({ x, y: chart.labels[at] })),
          backgroundColor: chart.labels.map(colour) },
        { type: "bar", label: "± one standard deviation", barThickness: 4, backgroundColor: chart.labels.map(colour),
          data: chart.means.map((mean, at) => [mean - (chart.deviations[at] ?? 0), mean + (chart.deviations[at] ?? 0)]) },
        { type: "line", label: "base", data: chart.base === null ? [] : chart.labels.map((y) => ({ x: chart.base, y })),
          pointRadius: 0, borderDash: [5, 4], borderWidth: 1.5, borderColor: style("--muted"), backgroundColor: "transparent" },
      ],
    },
    options: { indexAxis: "y", plugins: { legend: { display: false } },
      scales: { x: axis({ beginAtZero: false, grace: "4%" }), y: axis({ type: "category", labels: chart.labels, offset: true }) } },
  }),
  shares: (chart) => ({
    type: "bar",
    data: { labels: chart.labels, datasets: chart.series.map((one, at) =>
      ({ label: one.name, data: one.values.map((share) => 100 * share), backgroundColor: COLOURS[at % COLOURS.length] })) },
    options: { indexAxis: "y", scales: { x: axis({ stacked: true, max: 100, title: { display: true, text: "% of the rows" } }),
      y: axis({ stacked: true }) } },
  }),
  histogram: (chart) => ({
    type: "bar",
    data: { labels: chart.counts.map((_, at) => ((chart.edges[at] + chart.edges[at + 1]) / 2).toPrecision(3)),
      datasets: [{ label: "candidates", data: chart.counts, categoryPercentage: 1, barPercentage: 1,
        backgroundColor: chart.counts.map((_, at) =>
          chart.cutoff !== null && chart.edges[at + 1] > chart.cutoff ? COLOURS[0] : style("--muted")) }] },
    options: { plugins: { legend: { display: false } },
      scales: { x: axis({ title: { display: true, text: "influence score" } }),
        y: axis({ type: chart.logarithmic ? "logarithmic" : "linear" }) } },
  }),
  bars: (chart) => ({
    type: "bar",
    data: { labels: chart.labels, datasets: chart.series.map((one, at) =>
      ({ label: one.name, data: one.values, backgroundColor: COLOURS[at], borderColor: COLOURS[at], pointRadius: 0,
        type: one.line ? "line" : "bar", order: one.line ? 0 : 1 })) },
    options: { scales: { x: axis({ title: { display: Boolean(chart.x), text: chart.x } }), y: axis() } },
  }),
};

function draw(canvas, config) {
  const options = config.options;
  Object.assign(options, { animation: false, responsive: true, maintainAspectRatio: false });
  options.plugins = { legend: { labels: { boxWidth: 12 } }, ...options.plugins };
  drawn.push(new Chart(canvas, config));
}

function drawFigures(anchor) {
  for (const [key, charts] of Object.entries(dataOf(anchor).charts)) {
    const figure = document.querySelector(`[data-figure="${key}"]`);
    let box = figure.querySelector(".charts");
    if (!box) {
      box = element("div", "", "charts");
      figure.prepend(box);
      figure.classList.add("drawn");
      for (const chart of charts) {
        const canvas = element("canvas", "");
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", chart.title);
        const frame = element("div", "", "canvas");
        frame.append(canvas);
        box.append(frame);
      }
    }
    box.querySelectorAll("canvas").forEach((canvas, at) => {
      const config = KINDS[charts[at].kind](charts[at]);
      config.options.plugins = { ...config.options.plugins,
        title: { display: true, text: charts[at].title, color: style("--ink") } };
      draw(canvas, config);
    });
  }
}

/* ---- the map ---- */

const NOT_TAKEN = "not taken";

function drawMap(box) {
  const points = dataOf(box.dataset.map).map;
  const strategy = box.querySelector("select").value;
  box.hidden = false;
  const groups = new Map();
  for (const point of points) {
    const group = strategy ? (point[4].includes(strategy) ? `taken by ${strategy}` : NOT_TAKEN) : point[2];
    groups.set(group, [...(groups.get(group) ?? []), point]);
  }
  // The largest first, and drawn last: small groups lie on top of it.
  const ordered = [...groups].sort(([a, its], [b, others]) => others.length - its.length || (a < b ? -1 : 1));
  const named = ordered.slice(0, COLOURS.length - 1);
  const rest = ordered.slice(COLOURS.length - 1).flatMap(([, its]) => its);
  if (rest.length) named.push(["other sources", rest]);
  draw(box.querySelector("canvas"), {
    type: "scatter",
    data: { datasets: named.map(([label, its], at) => ({
      label, pointRadius: 3, backgroundColor: label === NOT_TAKEN ? style("--muted") : COLOURS[at], order: -at,
      data: its.map(([x, y, source, text]) => ({ x, y, source, text })) })) },
    options: {
      scales: { x: axis({ title: { display: true, text: "first component" } }),
        y: axis({ title: { display: true, text: "second component" } }) },
      plugins: { legend: { reverse: true, labels: { boxWidth: 12 } }, tooltip: { callbacks: { label: (item) => `${item.raw.source}: ${item.raw.text}` } } },
    },
  });
}

/* ---- all of it ---- */

function drawAll() {
  while (drawn.length) drawn.pop().destroy();
  Chart.defaults.color = style("--ink");
  document.querySelectorAll("section.target").forEach((section) => drawFigures(section.id));
  document.querySelectorAll(".map").forEach(drawMap);
}

document.documentElement.classList.add("scripted");
sortTables();
document.querySelectorAll(".explorer").forEach(explore);
drawAll();
document.querySelectorAll(".map select").forEach((select) => select.addEventListener("change", drawAll));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
// Paper is white, whatever the screen is.
for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) {
  addEventListener(event, () => {
    document.documentElement.classList.toggle("printing", printing);
    drawAll();
  });
}
