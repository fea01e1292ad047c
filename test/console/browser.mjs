// What the scripts of this directory share: a browser, steps that are printed one JSON line each, and the console as a person uses it.
import { readFileSync } from 'node:fs';
import { chromium } from '../../appliance/console/node_modules/playwright-core/index.mjs';

const { VARVE_SHOTS: shots } = process.env;
/** How long a page is waited for; longer where an hour is watched, beside other work. */
export const wait = Number(process.env.VARVE_SOAK_SECONDS ?? 0) > 0 ? 300_000 : 30_000;
export const password = 'correct horse battery staple';
export const axe = readFileSync(new URL('../../appliance/console/node_modules/axe-core/axe.min.js', import.meta.url), 'utf8');

export const print = (o) => process.stdout.write(`${JSON.stringify(o)}\n`);
export const show = (text) => print({ show: `console: ${text}` });
export const must = (ok, why) => {
  if (!ok) throw new Error(why);
};

export const browser = await chromium.launch({
  executablePath: '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
});

const launched = Date.now();
let failed = false;
/** What the browser's console said; a failure, but for what a step provokes. */
export const said = [];
const expected = new Map();
/** Has what the browser says while f runs be no failure where it fits: of all pages, or of one beside which others are at work. */
export async function expecting(fits, f, of = 'all') {
  expected.set(of, fits);
  try {
    return await f();
  } finally {
    expected.delete(of);
  }
}
const isExpected = (p, text) => [p, 'all'].some((of) => expected.get(of)?.(text));

/** A page in a window of its own, signed in as another page is: a page behind another one in its window does not draw. */
export async function open(origins, as) {
  const context = await browser.newContext({ ...(as ? { storageState: await as.context().storageState() } : {}), ignoreHTTPSErrors: true, viewport: { width: 1280, height: 900 }, acceptDownloads: true, reducedMotion: 'reduce' });
  const p = await context.newPage();
  p.setDefaultTimeout(wait);
  p.on('console', (m) => {
    const of = m.location().url;
    // A page is shown for a moment longer than its object is there.
    const gone = m.text().includes('404') && /\/api\/customer\/v1\/[a-z]+\/[^/]+/.test(of);
    if (['error', 'warning'].includes(m.type()) && !gone && !isExpected(p, m.text())) said.push(`${p.url()}: ${m.text()} ${of}`);
  });
  p.on('pageerror', (e) => said.push(`${p.url()}: ${e.message}`));
  p.on('request', (r) => {
    if (!origins.some((o) => r.url().startsWith(o)) && !/^(data|blob):/.test(r.url())) said.push(`${p.url()}: a request leaves the appliance: ${r.url()}`);
  });
  return p;
}

const took = [];
export async function step(name, page, f) {
  const began = Date.now();
  const seconds = () => {
    const s = (Date.now() - began) / 1000;
    took.push([s, name]);
    return s;
  };
  try {
    await f();
    print({ step: name, seconds: seconds() });
  } catch (e) {
    failed = true;
    print({ step: name, seconds: seconds(), error: String(e.stack ?? e).slice(0, 3000) });
    await page.screenshot({ path: `${shots}/failed-${name.replace(/\W+/g, '-')}.png` }).catch(() => undefined);
    await page.keyboard.press('Escape').catch(() => undefined);
  }
}

export async function end() {
  await step('nothing in the browser console, no request elsewhere', { screenshot: async () => undefined, keyboard: { press: async () => undefined } },
    async () => must(said.length === 0, said.slice(0, 20).join('\n')));
  await browser.close();
  const slow = took.sort((a, b) => b[0] - a[0]).slice(0, 8).map(([s, name]) => `${name} ${s.toFixed(1)}`);
  show(`${Math.round((Date.now() - launched) / 1000)} s, of which the longest steps: ${slow.join('; ')}`);
  print({ step: 'end' });
  process.exit(failed ? 1 : 0);
}

/** The keyboard alone: what a person without a mouse does. */
export function keyboard(page) {
  const at = () => page.evaluate(() => {
    const e = document.activeElement;
    return { name: e?.getAttribute('name') ?? '', text: (e?.getAttribute('aria-label') ?? e?.innerText ?? '').trim(), dialog: Boolean(e?.closest('[role=dialog]')), menu: Boolean(e?.closest('[role=menu]')) };
  });
  /** Presses Tab until what fits has the focus; what was passed on the way. */
  async function tabTo(what, fits, key = 'Tab', max = 60) {
    const seen = [];
    for (let i = 0; i < max; i++) {
      const e = await at();
      if (fits(e)) return seen;
      seen.push(e.name || e.text);
      await page.keyboard.press(key);
    }
    throw new Error(`${what} is not reached by ${key}: ${seen.join(', ')}`);
  }
  /** From the page's top by its first link to the content, on to a button, and presses it. */
  async function press(text) {
    // Where Tab begins is the page's top, not where the mouse was last.
    await page.evaluate(() => {
      document.body.tabIndex = -1;
      document.body.focus();
      document.body.removeAttribute('tabindex');
    });
    await page.keyboard.press('Tab');
    must((await at()).text === 'Skip to content', `the first thing that Tab reaches is ${JSON.stringify(await at())}`);
    await page.keyboard.press('Enter');
    await tabTo(text, (e) => e.text === text);
    await page.keyboard.press('Enter');
  }
  const inDialog = () => page.waitForFunction(() => document.activeElement?.closest('[role=dialog]'), undefined, { timeout: wait });
  return {
    at, tabTo, press, inDialog,
    /** Opens a dialog from a button, or an item of the menu behind it. */
    async open(text, item) {
      await press(text);
      if (item) {
        await page.waitForFunction(() => document.activeElement?.closest('[role=menu]'));
        await tabTo(item, (e) => e.menu && e.text === item, 'ArrowDown', 20);
        await page.keyboard.press('Enter');
      }
      await inDialog();
    },
    /** Types into fields of the dialog by their names; a choice by the beginning of its text. */
    async fill(fields) {
      for (const [name, value] of Object.entries(fields)) {
        await tabTo(`field ${name}`, (e) => e.name === name);
        if (await page.evaluate(() => document.activeElement?.matches('input:not([type=checkbox]), textarea'))) await page.keyboard.press('Control+A');
        if (value === true) await page.keyboard.press('Space');
        else await page.keyboard.type(value);
      }
    },
    async submit(text) {
      await tabTo(text, (e) => e.dialog && e.text === text);
      await page.keyboard.press('Enter');
    },
    /** Goes once round the open dialog: the focus stays in it and comes to every field; Escape closes it, and the focus is back where it was opened. */
    async round(opener) {
      const fields = await page.$$eval('[role=dialog] [name]:not([disabled])', (list) => list.filter((e) => e.offsetParent !== null && e.type !== 'hidden').map((e) => e.name));
      const begin = JSON.stringify(await at());
      const seen = new Set();
      for (let i = 0, e = await at(); i < 60 && (i === 0 || JSON.stringify(e) !== begin); i++) {
        must(e.dialog, `Tab leaves the dialog, to ${JSON.stringify(e)}`);
        seen.add(e.name);
        await page.keyboard.press('Tab');
        e = await at();
      }
      const missed = fields.filter((f) => !seen.has(f));
      must(missed.length === 0, `Tab does not come to ${missed.join(', ')}`);
      await page.keyboard.press('Escape');
      await page.locator('[role=dialog]').waitFor({ state: 'detached' });
      await page.waitForFunction((text) => {
        const e = document.activeElement;
        return (e?.getAttribute('aria-label') ?? e?.innerText ?? '').trim() === text;
      }, opener, { timeout: 5000 }).catch(async () => {
        throw new Error(`after Escape the focus is at ${JSON.stringify(await at())}, not at ${opener}`);
      });
    },
  };
}
