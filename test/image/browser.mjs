// Drives the console of an appliance that runs in QEMU: browser.mjs first-run | nodes. Prints one JSON line a step; a failure leaves a screenshot.
//
//	first-run   from the set-up code to the overview, as whoever has just imported the image
//	nodes       signs in and waits for the node VARVE_NODE in the list of nodes
import { chromium } from '../../appliance/console/node_modules/playwright-core/index.mjs';

const { VARVE_URL: url, VARVE_CODE: code, VARVE_PASSWORD: password, VARVE_NODE: node, VARVE_SHOTS: shots } = process.env;
const what = process.argv[2];
const browser = await chromium.launch({
  executablePath: '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
});
const context = await browser.newContext({ ignoreHTTPSErrors: true, viewport: { width: 1280, height: 900 }, reducedMotion: 'reduce' });
const page = await context.newPage();
// The appliance is emulated: it answers a hundred times slower than a real one.
page.setDefaultTimeout(180_000);
const print = (o) => process.stdout.write(`${JSON.stringify(o)}\n`);
const field = (name) => page.locator(`[name="${name}"]`);
const button = (name) => page.getByRole('button', { name, exact: true });
const heading = (name) => page.getByRole('heading', { name, exact: true }).first().waitFor();

async function firstRun() {
  await page.goto(url);
  await field('code').fill(code);
  await field('password').fill(password);
  await field('again').fill(password);
  await page.screenshot({ path: `${shots}/first-run-1.png` });
  await button('Create the administrator').click();
  await heading('This appliance');
  await page.screenshot({ path: `${shots}/first-run-2.png` });
  for (const next of ['Cluster', 'Disks', 'First vPool', 'First host', 'Done']) {
    await button('Next').click();
    await heading(next);
  }
  await page.screenshot({ path: `${shots}/first-run-3.png` });
  await button('To the overview').click();
  await heading('Overview');
  await page.getByText('Live', { exact: true }).waitFor();
  await page.screenshot({ path: `${shots}/overview.png` });
}

async function nodes() {
  await page.goto(`${url}/nodes`);
  await field('name').fill('admin');
  await field('password').fill(password);
  await button('Sign in').click();
  await page.getByRole('row').filter({ hasText: node }).first().waitFor();
  await page.screenshot({ path: `${shots}/nodes.png` });
}

let failed;
try {
  await { 'first-run': firstRun, nodes }[what]();
} catch (e) {
  failed = String(e.stack ?? e).slice(0, 3000);
  await page.screenshot({ path: `${shots}/failed-${what}.png` }).catch(() => undefined);
}
await browser.close();
print({ step: what, error: failed });
process.exit(failed ? 1 : 0);
