// Leaves of each file that compresses only NAME.gz, and refuses a console that has grown beyond its budget.
import { readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { extname, join } from 'node:path';
import { gzipSync } from 'node:zlib';

const dist = new URL('../dist/', import.meta.url).pathname;
const initialBytesMax = 300 * 1024;
const totalBytesMax = 3 * 1024 * 1024;

const index = readFileSync(join(dist, 'index.html'), 'utf8');
const first = new Set([...index.matchAll(/(?:src|href)="\/(assets\/[^"]+\.js)"/g)].map((m) => m[1]));
let total = 0;
let initial = 0;
for (const entry of readdirSync(dist, { recursive: true, withFileTypes: true })) {
  const path = join(entry.parentPath ?? entry.path, entry.name);
  if (!entry.isFile() || entry.name === 'README') continue;
  const body = readFileSync(path);
  if (!['.html', '.js', '.css', '.svg', '.json'].includes(extname(path))) {
    total += body.length;
    continue;
  }
  const packed = gzipSync(body, { level: 9 });
  packed[9] = 255; // the field for the operating system: the same bytes everywhere
  writeFileSync(path + '.gz', packed);
  rmSync(path);
  total += packed.length;
  if (first.has(path.slice(dist.length))) initial += packed.length;
}
console.log(`console: ${Math.round(initial / 1024)} KiB of scripts at first, ${Math.round(total / 1024)} KiB in all, compressed`);
if (initial > initialBytesMax || total > totalBytesMax || initial === 0) {
  console.error(`the console is too large: at most ${initialBytesMax} and ${totalBytesMax} bytes`);
  process.exit(1);
}
