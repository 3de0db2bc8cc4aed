"use strict";
const tip = document.getElementById("tip");
const toggle = document.getElementById("logx");
const body = document.body;
toggle.parentElement.hidden = false;
toggle.addEventListener("change", () => body.classList.toggle("logx", toggle.checked));

// An arm that is pointed at is brought forward wherever it stands; one that was clicked stays there.
const kept = new Set();
const mark = (arm, on) => {
  for (const part of document.querySelectorAll(`[data-arm="${arm}"]`)) part.classList.toggle("on", on || kept.has(arm));
};

// The point nearest to the pointer is read out.
for (const drawing of document.querySelectorAll(".drawing")) {
  const points = JSON.parse(drawing.dataset.points);
  const [notes, arms] = ["notes", "arms"].map((key) => JSON.parse(drawing.closest("figure").dataset[key]));
  const svg = drawing.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  let pointed = null;
  const point = (arm) => {
    if (arm === pointed) return;
    mark(pointed, false);
    mark(pointed = arm, true);
  };
  const hide = () => { tip.hidden = true; cursor.style.visibility = "hidden"; point(null); };
  const show = ([x, y, arm, index]) => {
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    cursor.setAttribute("cx", x);
    cursor.setAttribute("cy", y);
    cursor.style.visibility = "visible";
    point(String(arms[arm]));
    tip.textContent = notes[arm][index];
    tip.hidden = false;
    const left = Math.min(box.left + x * scale + 14, document.documentElement.clientWidth - tip.offsetWidth - 6);
    const above = box.top + y * scale - tip.offsetHeight - 12;
    tip.style.left = Math.max(6, left) + window.scrollX + "px";
    tip.style.top = (above < 4 ? box.top + y * scale + 14 : above) + window.scrollY + "px";
  };
  const seek = (event) => {
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const [px, py] = [(event.clientX - box.left) / scale, (event.clientY - box.top) / scale];
    const distance = ([x, y]) => (x - px) ** 2 + (y - py) ** 2;
    if (points.length) show(points.reduce((a, b) => (distance(b) < distance(a) ? b : a)));
  };
  svg.addEventListener("pointermove", seek);
  svg.addEventListener("pointerdown", seek);
  svg.addEventListener("pointerleave", hide);
}

// Pointing at an arm's name lets all others fade.
for (const item of document.querySelectorAll("li[data-arm], text.name")) {
  const arm = item.closest("[data-arm]").dataset.arm;
  const pick = (on) => () => {
    body.classList.toggle("picked", on);
    mark(arm, on);
  };
  for (const kind of ["pointerenter", "focus"]) item.addEventListener(kind, pick(true));
  for (const kind of ["pointerleave", "blur"]) item.addEventListener(kind, pick(false));
}

// A click on it, or Enter, keeps its lines in front.
for (const item of document.querySelectorAll(".legend li, text.name")) {
  const arm = item.closest("[data-arm]").dataset.arm;
  const keep = () => {
    kept.has(arm) ? kept.delete(arm) : kept.add(arm);
    mark(arm, kept.has(arm));
    for (const chip of document.querySelectorAll(`.legend [data-arm="${arm}"]`)) chip.ariaPressed = kept.has(arm);
  };
  item.addEventListener("click", keep);
  item.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); keep(); }
  });
}

// A table that does not fit says that it scrolls.
const hint = () => {
  for (const said of document.querySelectorAll(".hint")) {
    const box = said.nextElementSibling;
    said.hidden = box.scrollWidth <= box.clientWidth + 1;
  }
};
hint();
addEventListener("resize", hint);
document.addEventListener("toggle", hint, true);

const copy = document.querySelector(".command button");
if (copy && navigator.clipboard) {
  copy.hidden = false;
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.querySelector(".command code").textContent);
    copy.textContent = "copied";
  });
}
