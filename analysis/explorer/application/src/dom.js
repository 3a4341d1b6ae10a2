// Building of elements. Text is always set as text, never as HTML: names of classes and files are data.

/** Create an element: element("button", {class: "chip", onclick: f}, "text", child, ...). */
export function element(name, attributes = {}, ...children) {
  const node = name.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** A select with its label. @param options [[value, text], ...] or {group: [[value, text], ...]} */
export function picker(label, options, value, onchange) {
  const select = element("select", { onchange: () => onchange(select.value) });
  fillOptions(select, options, value);
  return { node: element("label", { class: "picker" }, element("span", {}, label), select), select };
}

export function fillOptions(select, options, value) {
  const items = (pairs) => pairs.map(([key, text]) => element("option", { value: key }, text));
  select.replaceChildren(
    ...(Array.isArray(options)
      ? items(options)
      : Object.entries(options).map(([group, pairs]) =>
          element("optgroup", { label: group }, ...items(pairs)),
        )),
  );
  select.value = value;
}

export const countText = (count) => count.toLocaleString("en-US");

/** A value with four significant digits; NaN as "not measured". */
export function valueText(value) {
  if (Number.isNaN(value) || value === undefined) return "not measured";
  if (value === 0 || !Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e5) return value.toExponential(3).replace("e+", "e");
  return Number(value.toPrecision(4)).toString();
}

export function download(name, content, type) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  const link = element("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
