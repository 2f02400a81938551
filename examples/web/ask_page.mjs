// Uses the page in a headless browser as a person does: node ask_page.mjs JOB.json FOUND.json, with a pinned playwright.
// JOB: {browser, url, dtype, questions: [{picture, question}], notPicture, screenshots}. FOUND: answers and addresses.
import { readFileSync, writeFileSync } from "node:fs";
import { chromium } from "playwright-core";

const job = JSON.parse(readFileSync(process.argv[2], "utf8"));
const browser = await chromium.launch({
  executablePath: job.browser,
  args: ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"], // nothing else has an address
});
const context = await browser.newContext({ viewport: { width: 1000, height: 640 }, colorScheme: "light" });
const page = await context.newPage();
const found = { version: browser.version(), addresses: [], complaints: [], answers: [], errors: {} };
context.on("request", (request) => found.addresses.push(request.url()));
page.on("console", (message) => message.type() === "error" && found.complaints.push(message.text()));
page.on("pageerror", (error) => found.complaints.push(String(error)));

// A model that does not come: one sentence says so, also when a question is asked.
await page.route("**/onnx/**", (route) => route.abort());
await page.goto(job.url);
await page.locator("#error", { hasText: "does not load" }).waitFor();
await page.locator("#ask").click();
found.errors.model = await page.locator("#error").textContent();
found.complaints.length = 0; // of the file that was held back
await page.unroute("**/onnx/**");

await page.goto(`${job.url}?dtype=${job.dtype}`);
await page.screenshot({ path: `${job.screenshots}/loading.png` });
found.isolated = await page.evaluate(() => crossOriginIsolated);
const error = async () => {
  await page.locator("#error:not([hidden])").waitFor();
  return page.locator("#error").textContent();
};

// What a person may do wrong.
await page.locator("#ask").click();
found.errors.picture = await error();
await page.locator("#file").setInputFiles(job.notPicture);
await page.locator("#error", { hasText: "is no picture" }).waitFor();
found.errors.file = await error();
await page.screenshot({ path: `${job.screenshots}/error.png` });

// By keyboard alone: from the picture to the question and its answer. The first picture is dropped, the others chosen.
for (const [number, { picture, question }] of job.questions.entries()) {
  if (number === 0) await dropped(picture);
  else await page.locator("#file").setInputFiles(picture);
  await page.locator("#drop.filled #picture:not([hidden])").waitFor();
  await page.waitForFunction((name) => document.getElementById("name").textContent.startsWith(name), picture.split("/").at(-1));
  if (number === 0) {
    await page.locator("#file").focus();
    await page.keyboard.press("Tab");
    await page.keyboard.press("Enter");
    found.errors.question = await error();
  }
  await page.locator("#question").fill("");
  await page.keyboard.type(question);
  await page.keyboard.press("Enter");
  await page.locator("#answer[data-tokens]").waitFor({ timeout: 60_000 });
  found.answers.push(await page.evaluate(() => ({
    tokens: JSON.parse(document.getElementById("answer").dataset.tokens),
    text: document.getElementById("text").textContent,
    time: document.getElementById("time").textContent,
  })));
}
await page.screenshot({ path: `${job.screenshots}/light.png` });
await page.emulateMedia({ colorScheme: "dark" });
await page.screenshot({ path: `${job.screenshots}/dark.png` });
await page.setViewportSize({ width: 390, height: 860 });
await page.screenshot({ path: `${job.screenshots}/narrow.png`, fullPage: true });
await browser.close();
writeFileSync(process.argv[3], JSON.stringify(found));

async function dropped(path) {
  const bytes = [...readFileSync(path)];
  const transfer = await page.evaluateHandle(({ bytes, name }) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
    return data;
  }, { bytes, name: path.split("/").at(-1) });
  await page.dispatchEvent("#drop", "dragover", { dataTransfer: transfer });
  await page.dispatchEvent("#drop", "drop", { dataTransfer: transfer });
}
