// A string such as "@rung" in a figure is replaced by the value of --rung of the page's theme.
const data = JSON.parse(document.getElementById("data").textContent);
const narrow = matchMedia("(max-width: 40rem)");
const touch = matchMedia("(pointer: coarse)");

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function coloured(value) {
  if (typeof value === "string") return value.startsWith("@") ? colour(value.slice(1)) : value;
  if (Array.isArray(value)) return value.map(coloured);
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, coloured(inner)]));
  }
  return value;
}
