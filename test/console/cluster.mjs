// Three nodes in a browser: one goes away and comes back, then the leader; console_test.go says how it is run.
import { end, expecting, must, open, password, print, show, step, wait } from './browser.mjs';

const { VARVE_URLS: list, VARVE_NFS: nfsList, VARVE_CODE: code, VARVE_FRESH_CODE: freshCode, VARVE_SHOTS: shots } = process.env;
const urls = list.split(' ');
const nfs = nfsList.split(' ');
const page = await open(urls);
const row = (i) => page.getByRole('row').filter({ hasText: nfs[i] });
const state = (i, word) => row(i).getByText(word, { exact: true });
const goal = 10_000;

async function signIn(url, p = page) {
  await p.goto(`${url}/nodes`);
  await p.locator('[name="name"]').fill('admin');
  await p.locator('[name="password"]').fill(password);
  await p.getByRole('button', { name: 'Sign in', exact: true }).click();
  await p.getByRole('heading', { name: 'Storage routers', level: 1 }).waitFor();
}

await step('three nodes are online', page, async () => {
  await page.goto(urls[0]);
  await page.locator('[name="code"]').fill(code);
  await page.locator('[name="password"]').fill(password);
  await page.locator('[name="again"]').fill(password);
  await page.getByRole('button', { name: 'Create the administrator' }).click();
  await page.getByRole('heading', { name: 'This appliance', exact: true }).waitFor();
  await page.goto(`${urls[0]}/nodes`);
  for (const i of [0, 1, 2]) await state(i, 'Online').waitFor({ timeout: 2 * wait });
  await page.goto(`${urls[0]}/certificates`);
  await page.getByText('Valid', { exact: true }).nth(2).waitFor();
  await page.goto(`${urls[0]}/disks`);
  await page.getByRole('row').nth(3).waitFor(); // a head, and a disk of each
  await page.goto(`${urls[0]}/nodes`);
  await state(0, 'Online').waitFor();
});

const lost = async (i, what) => {
  const at = Date.now();
  print({ do: 'kill', node: i });
  await state(i, 'Unreachable').waitFor({ timeout: 2 * wait });
  const took = Date.now() - at;
  show(`${what} is killed: seen after ${(took / 1000).toFixed(1)} s (goal ${goal / 1000})`);
  must(took < 4 * goal, 'that is four times as long as it may take');
};
const back = async (i) => {
  print({ do: 'start', node: i });
  await state(i, 'Online').waitFor({ timeout: 3 * wait });
};

await step('a node is lost, seen, and back', page, () => expecting((text) => /50[0-9]/.test(text), async () => {
  const name = await row(2).getByRole('link').innerText();
  await lost(2, 'a node of three');
  for (const theme of ['light', 'dark']) {
    await page.evaluate((dark) => document.documentElement.classList.toggle('pf-v6-theme-dark', dark), theme === 'dark');
    await page.screenshot({ path: `${shots}/lost-nodes-${theme}-1280.png` });
  }
  await page.getByRole('link', { name: 'Overview', exact: true }).click();
  await page.getByText(`No word from ${name}`).first().waitFor({ timeout: 2 * wait });
  await page.getByText(/of 3 voters are left/).first().waitFor();
  await page.screenshot({ path: `${shots}/lost-overview-dark-1280.png`, fullPage: true });
  await page.getByRole('link', { name: 'Disks', exact: true }).click();
  await page.getByText(/last known, (.* ago|just now)/).first().waitFor({ timeout: 2 * wait });
  await page.screenshot({ path: `${shots}/lost-disks-dark-1280.png`, fullPage: true });
  await page.goto(`${urls[0]}/nodes`);
  await state(2, 'Unreachable').waitFor(); // what was known last of it is shown still
  await back(2);
}));
await step('the leader is lost, seen from another node', page, () => expecting(() => true, async () => {
  await signIn(urls[1]);
  for (const i of [0, 1, 2]) await state(i, 'Online').waitFor({ timeout: 2 * wait });
  await lost(0, 'the leader of three');
  await page.getByRole('row').filter({ hasText: 'Leader' }).first().waitFor({ timeout: 2 * wait }); // another one leads
  await back(0);
}));
await step('a fresh appliance joins from its first run', page, () => expecting(() => true, async () => {
  await page.getByRole('button', { name: 'Add an appliance' }).click();
  await page.locator('[name="role"]').selectOption('extra');
  await page.getByRole('button', { name: 'Make a token' }).click();
  const token = await page.getByRole('textbox', { name: 'Join token' }).inputValue();
  const fresh = await open(urls);
  const field = (name) => fresh.locator(`[name="${name}"]`);
  const press = (name) => fresh.getByRole('button', { name, exact: true }).click();
  await fresh.goto(urls[3]);
  await press('Join a cluster instead');
  await field('code').fill(freshCode);
  await field('token').fill('no token at all');
  await press('Join and restart');
  await fresh.locator('.pf-v6-c-alert.pf-m-danger').waitFor();
  must((await field('token').inputValue()) === 'no token at all', 'what was typed is gone');
  await press('Make an administrator instead');
  await field('code').fill(freshCode);
  await field('password').fill(password);
  await field('again').fill(password);
  await press('Create the administrator');
  await fresh.getByRole('heading', { name: 'This appliance', exact: true }).waitFor();
  await press('Next');
  await fresh.getByRole('radio', { name: 'Join another cluster' }).check();
  await field('token').fill(token);
  await press('See what it does');
  await fresh.locator('.varve-effect').waitFor();
  await fresh.screenshot({ path: `${shots}/join-effect-light-1280.png`, fullPage: true });
  await press('Join and restart');
  await fresh.getByText('It is admitted, and restarts').waitFor({ timeout: 3 * wait });
  await fresh.screenshot({ path: `${shots}/joined-light-1280.png`, fullPage: true });
  const deadline = Date.now() + 3 * wait;
  for (;;) {
    try {
      // It may be the one before the restart that answers, with the users of its own.
      await fresh.context().clearCookies();
      await fresh.goto(urls[3]);
      await fresh.evaluate(() => localStorage.clear());
      await signIn(urls[3], fresh);
      await fresh.getByRole('row').filter({ hasText: 'this one' }).filter({ hasText: 'extra' }).getByText('Online', { exact: true }).waitFor();
      break;
    } catch (e) {
      if (Date.now() > deadline) throw e;
      await fresh.waitForTimeout(500);
    }
  }
  await fresh.context().close();
}));
await end();
