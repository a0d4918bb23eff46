// What the server answers to the form: the field that is wrong and why, or that the job is queued.
const show = () => {
  let answer = {};
  try { answer = JSON.parse(props.value || "{}"); } catch { return; }
  for (const old of document.querySelectorAll(".sw-field-error")) old.remove();
  for (const old of document.querySelectorAll('[aria-invalid="true"]')) { old.removeAttribute("aria-invalid"); old.removeAttribute("aria-describedby"); }
  for (const id of ["sw-summary", "sw-compare-summary"]) {
    const line = document.getElementById(id);
    if (line) line.textContent = answer.text || "";
  }
  if (answer.field) {
    const field = document.getElementById(`field-${answer.field}`);
    if (field) {
      const text = Object.assign(document.createElement("p"), { className: "sw-field-error", id: "sw-field-error", textContent: answer.text });
      field.append(text);
      const input = field.querySelector("textarea, input");
      input?.setAttribute("aria-invalid", "true");
      input?.setAttribute("aria-describedby", "sw-field-error");
    }
  }
  if (answer.queued) window.dispatchEvent(new Event("sagewan:queued"));
};
watch("value", show);
if (!window.sagewanKeys) {
  window.sagewanKeys = true;
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) document.getElementById("sw-go")?.click();
  });
}
