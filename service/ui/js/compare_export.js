// A comparison as a file: all of it as JSON, a line a text as CSV.

/** JSON of `result`, as comparison_table.js takes it. */
export function asJson(result) {
  const { left, right, role, summary, rows } = result;
  return `${JSON.stringify({ left, right, role, summary, results: rows.map(({ text, index, changed, left: one, right: other }) => ({ index, text, changed, left: one, right: other })) }, null, 2)}\n`;
}

/** CSV of `result`, readable by spreadsheets, which take no field of it for a formula. */
export function asCsv(result) {
  const domains = result.domains;
  const head = ["index", "text", "changed", "left_action", "right_action", ...domains.flatMap((domain) => [`left_${domain}`, `right_${domain}`]), "left_rules", "right_rules"];
  const rules = (side) => side.verdicts.map((verdict) => verdict.rule).join(" ");
  const lines = result.rows.map((row) => [row.index, row.text, row.changed, row.left.action, row.right.action,
    ...domains.flatMap((domain) => [row.left.scores[domain] ?? "", row.right.scores[domain] ?? ""]), rules(row.left), rules(row.right)]);
  return `\uFEFF${[head, ...lines].map((line) => line.map(cell).join(",")).join("\r\n")}\r\n`;
}

/** One field. An apostrophe before = + - @ (also after a space) keeps a spreadsheet from calculating a text. */
function cell(value) {
  if (typeof value !== "string") return String(value);
  const harmless = /^\s*[=+\-@\uFF1D\uFF0B\uFF0D\uFF20]|^[\t\r\n]/.test(value) ? `'${value}` : value;
  return `"${harmless.replaceAll('"', '""')}"`;
}

/** Let the browser save `content`. */
export function download(name, type, content) {
  const address = URL.createObjectURL(new Blob([content], { type }));
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}
