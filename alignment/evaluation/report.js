// Search in questions and responses, and showing or hiding a model. Without this script everything can be unfolded.
const search = document.querySelector("input[type=search]");
const found = document.querySelector("output");
const asks = [...document.querySelectorAll("details.ask-all")];

function mark(node, words) {
  node.textContent = node.textContent; // takes the old marks away
  const text = node.textContent, at = words ? text.toLowerCase().indexOf(words) : -1;
  if (at < 0) return;
  const range = document.createRange();
  range.setStart(node.firstChild, at);
  range.setEnd(node.firstChild, Math.min(at + words.length, text.length));
  range.surroundContents(document.createElement("mark"));
}

function filter() {
  const words = search.value.trim().toLowerCase();
  let shown = 0;
  for (const ask of asks) {
    ask.hidden = !ask.textContent.toLowerCase().includes(words);
    shown += !ask.hidden;
    ask.querySelectorAll(".ask, article p").forEach((node) => mark(node, words));
    if (words) ask.open = !ask.hidden;
  }
  found.textContent = words ? `${shown} of ${asks.length}` : `${asks.length} entries`;
}

if (search) {
  document.querySelector(".tools").hidden = false;
  search.addEventListener("input", filter);
  document.querySelector("button.all").addEventListener("click", () => {
    const open = !asks.every((ask) => ask.open || ask.hidden);
    asks.forEach((ask) => (ask.open = open));
  });
  for (const button of document.querySelectorAll("button[data-model]")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", on);
      document.querySelectorAll("article").forEach((article) => {
        if (article.dataset.model === button.dataset.model) article.hidden = !on;
      });
    });
  }
  filter();
}
