// Empties dist/ but for its README, which is in the repository.
import { readdirSync, rmSync } from 'node:fs';

const dist = new URL('../dist/', import.meta.url).pathname;
for (const name of readdirSync(dist)) {
  if (name !== 'README') rmSync(dist + name, { recursive: true });
}
