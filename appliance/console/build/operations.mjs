// Makes src/api/operations.gen.ts: of every operation of the two APIs its method, path, roles and command line.
import { readFileSync, writeFileSync } from 'node:fs';
import { parse } from 'yaml';

const root = new URL('../../../control/api/', import.meta.url).pathname;
const out = {};
for (const [name, prefix] of [['customer', '/api/customer/v1'], ['internal', '/api/internal']]) {
  const spec = parse(readFileSync(`${root}${name}/openapi.yaml`, 'utf8'), { merge: true, maxAliasCount: -1 });
  for (const [path, item] of Object.entries(spec.paths)) {
    for (const method of ['get', 'put', 'post', 'patch', 'delete']) {
      const o = item[method];
      if (!o) continue;
      const parameters = [...(item.parameters ?? []), ...(o.parameters ?? [])];
      const has = (p) => parameters.some((x) => (x.$ref ?? '').endsWith('/' + p));
      out[o.operationId] = {
        method: method.toUpperCase(),
        path: prefix + path,
        summary: o.summary,
        cli: o['x-varve-cli'].startsWith('none:') ? '' : o['x-varve-cli'],
        dry: has('DryRun'),
        form: Boolean(o.requestBody?.content?.['application/x-www-form-urlencoded']),
      };
    }
  }
}
writeFileSync(new URL('../src/api/operations.gen.ts', import.meta.url),
  `// Made by build/operations.mjs from the specifications.\nexport const operations = ${JSON.stringify(out, null, 1)} as const;\n`);
