// Bundle the explorer into dist/: one classic script and one style sheet, which work from file://.
import { build } from "esbuild";
import { copyFile } from "node:fs/promises";

await build({
  entryPoints: { app: "src/main.js" },
  outdir: "dist",
  bundle: true,
  format: "iife",
  minify: true,
  charset: "ascii",
  target: ["chrome100", "firefox100", "safari15"],
  legalComments: "eof",
  logLevel: "warning",
});
await copyFile("src/index.html", "dist/index.html");
