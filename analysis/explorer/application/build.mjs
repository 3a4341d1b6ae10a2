// Bundle the explorer into dist/: one classic script and one style sheet, which work from file://, and the licences of the
// packages in the bundle.
import { build } from "esbuild";
import { copyFile, readdir, readFile, writeFile } from "node:fs/promises";

const { metafile } = await build({
  entryPoints: { app: "src/main.js" },
  outdir: "dist",
  bundle: true,
  format: "iife",
  minify: true,
  charset: "ascii",
  target: ["chrome100", "firefox100", "safari15"],
  legalComments: "none", // LICENSES.txt has them
  metafile: true,
  logLevel: "warning",
});
await copyFile("src/index.html", "dist/index.html");

const packages = new Set();
for (const output of Object.values(metafile.outputs)) {
  for (const input of Object.keys(output.inputs)) {
    const found = input.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)\//);
    if (found) packages.add(found[1]);
  }
}
const licences = [];
for (const name of [...packages].sort()) {
  const folder = `node_modules/${name}`;
  const { version, license } = JSON.parse(await readFile(`${folder}/package.json`, "utf8"));
  const file = (await readdir(folder)).find((entry) => /^licen[sc]e/i.test(entry));
  const text = file ? await readFile(`${folder}/${file}`, "utf8") : `Licence: ${license}\n`;
  licences.push(`${name} ${version}\n\n${text.trim()}\n`);
}
await writeFile("dist/LICENSES.txt", licences.join(`\n${"-".repeat(80)}\n\n`));
