async function main() {
  for (const table of document.querySelectorAll("table.sortable")) sortable(table);
  try {
    await loadPlotly();
  } catch (error) {
    const trouble = document.getElementById("trouble");
    trouble.textContent = `The charts need a browser of 2023 or later (${error.message}); the tables work in this one.`;
    trouble.hidden = false;
    return;
  }
  await Promise.all([...document.querySelectorAll("[data-section]")].map(chartOf));
  if (document.getElementById("file")) {
    pickers();
    drawTensors();
    for (const name of ["types", "prices", "statistics"]) {
      const element = document.getElementById(`heat-${name}`);
      if (element) keys(element);
    }
    document.getElementById("search").addEventListener("input", search);
  }
  for (const query of [matchMedia("(prefers-color-scheme: dark)"), narrow, touch]) {
    query.addEventListener("change", drawAll);
  }
  // On paper the theme is light, and charts are as wide as the page.
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  document.documentElement.dataset.ready = "yes";
}

const unfolded = [];

function print(begin) {
  document.documentElement.classList.toggle("printed", begin);
  // On paper all folded parts are unfolded.
  if (begin) unfolded.push(...document.querySelectorAll("details:not([open])"));
  for (const details of unfolded) details.open = begin;
  if (!begin) unfolded.length = 0;
  for (const [element, make] of drawn) paint(element, begin ? onPaper(make(), element) : make());
}

function onPaper(figure, element) {
  const side = element.closest(".grid") ? 330 : 680;
  return { ...figure, layout: { ...figure.layout, width: side, autosize: false } };
}

main();
