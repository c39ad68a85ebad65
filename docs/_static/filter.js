// On the page of all objectives: a field that leaves the rows with these words.
document.addEventListener("DOMContentLoaded", () => {
  const section = document.querySelector("section#objectives");
  if (!section) return;
  const field = document.createElement("input");
  Object.assign(field, { type: "search", className: "filter", placeholder: "filter: simpo, length, 2305.18290 …" });
  section.querySelector("h1").after(field);
  const rows = [...section.querySelectorAll("tbody tr")];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const families = [...section.querySelectorAll("section")];
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row, i) => { row.hidden = !words.every((word) => texts[i].includes(word)); });
    families.forEach((family) => { family.hidden = !family.querySelector("tbody tr:not([hidden])"); });
  });
});
