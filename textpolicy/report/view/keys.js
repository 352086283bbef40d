// The keys of the viewer, and its filters, which act at once. This runs in a frame: the page around it has no script.
"use strict";
const page = parent.document;
const form = page.querySelector("form.filter");
let asked = 0, waiting;

async function filter() {
  const address = "./?" + new URLSearchParams([...new FormData(form)].filter(([, value]) => value.trim()));
  const mine = ++asked;
  const answer = await fetch(address).then((found) => found.text(), () => "");
  if (mine !== asked) return;
  const fresh = new DOMParser().parseFromString(answer, "text/html");
  for (const id of ["count", "results"]) {
    const found = fresh.getElementById(id);
    const lost = id === "count" && !answer ? ["The viewer does not answer; start it again."] : [];
    page.getElementById(id).replaceChildren(...(found ? found.childNodes : lost));
  }
  parent.history.replaceState(null, "", address);
}

form?.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(filter, 200);
});

function follow(relation) {
  page.querySelector(`main a[rel=${relation}]`)?.click();
}

function move(step) {
  const lines = [...page.querySelectorAll("#results .line")];
  const shown = lines.filter((line) => !line.closest("details:not([open]) > :not(summary)"));
  if (!shown.length) return follow(step > 0 ? "next" : "prev");
  const at = shown.indexOf(page.activeElement);
  const next = shown[at < 0 ? (step > 0 ? 0 : shown.length - 1) : Math.min(Math.max(at + step, 0), shown.length - 1)];
  next.focus();
  next.scrollIntoView({ block: "nearest" });
}

const keys = {
  j: () => move(1),
  k: () => move(-1),
  ArrowRight: () => follow("next"),
  ArrowLeft: () => follow("prev"),
  u: () => follow("up"),
  "/": () => form?.elements.words.focus(),
};

page.addEventListener("keydown", (event) => {
  const written = event.target.closest?.("input, select, textarea");
  if (written && event.key === "Escape") written.blur();
  if (event.key.startsWith("Arrow") && event.target.closest?.("[tabindex]")) return; // which it scrolls
  if (written || event.ctrlKey || event.altKey || event.metaKey || !Object.hasOwn(keys, event.key)) return;
  event.preventDefault();
  keys[event.key]();
});

page.querySelector(":target")?.focus(); // the completion that one comes back from
