// What somebody who helps needs to see: chosen, read, then downloaded. It holds what `varve support bundle` takes from the API, by the same list.
import { Button, Checkbox, Content, ExpandableSection, Form, FormGroup, Progress } from '@patternfly/react-core';
import { useState } from 'react';
import sections from '../../../cli/support.json';
import { call, operations, problemOf } from '../api/call';
import type { Args, Op } from '../api/call';
import { useCall } from '../api/query';
import { useMay } from '../api/session';
import { care } from '../strings/care';
import { bytes } from '../ui/format';
import { Page } from '../ui/Page';
import { sha256, tarball } from '../ui/tar';
import { useToast } from '../ui/toast';

const s = care.support;
const prefix = '/api/customer/v1';
const itemsMax = 1000;
const whole = '.';

interface Part {
  name: string;
  text: string;
  count: number;
  missing?: string;
}

type Section = (typeof sections)[number];

const operationOf = (section: Section) => (Object.keys(operations) as Op[]).find((op) => operations[op].method === 'GET' && operations[op].path === prefix + section.path);
const reads = sections.flatMap((x) => operationOf(x) ?? []);

/** Reads a section and keeps the fields that it names. */
async function collect(section: Section): Promise<Part> {
  const op = operationOf(section);
  if (!op) return { name: section.name, text: '', count: 0, missing: section.path };
  const query = { consistency: 'stale', ...(section.of === '' ? { limit: itemsMax } : {}) };
  try {
    const answer = (await call(op, { query } as unknown as Args<typeof op>)) as unknown as Record<string, unknown>;
    const items = section.of === whole ? [answer] : ((answer[section.of || 'items'] ?? []) as Record<string, unknown>[]);
    const kept = items.map((x) => Object.fromEntries(section.fields.filter((f) => f in x).map((f) => [f, x[f]])));
    return { name: section.name, text: JSON.stringify(kept, null, 2), count: kept.length };
  } catch (e) {
    return { name: section.name, text: '', count: 0, missing: problemOf(e).message };
  }
}

export default function Support() {
  const status = useCall('getStatus');
  const may = useMay();
  const offered = sections.filter((x) => { const op = operationOf(x); return op !== undefined && may(op); });
  const [chosen, setChosen] = useState<string[]>(offered.map((x) => x.name));
  const [parts, setParts] = useState<Part[]>();
  const [done, setDone] = useState<number>();
  const toast = useToast();
  const gather = async () => {
    const wanted = offered.filter((x) => chosen.includes(x.name));
    const got: Part[] = [];
    setParts(undefined);
    for (const [i, x] of wanted.entries()) {
      setDone(i);
      got.push(await collect(x));
    }
    setDone(undefined);
    setParts(got);
  };
  const save = async () => {
    const now = new Date();
    const there = (parts ?? []).filter((p) => p.missing === undefined);
    const manifest = {
      made: now.toISOString(), by: `varve ${status.data?.version ?? ''} console`,
      parts: await Promise.all((parts ?? []).map(async (p) => (p.missing === undefined ? { section: p.name, file: `${p.name}.json`, sha256: await sha256(p.text) } : { section: p.name, missing: p.missing }))),
    };
    const files = [...there.map((p) => [`varve-support/${p.name}.json`, p.text] as [string, string]), ['varve-support/manifest.json', JSON.stringify(manifest, null, 2)] as [string, string]];
    const a = document.createElement('a');
    a.href = URL.createObjectURL(await tarball(files, now));
    a.download = `varve-support-${now.toISOString().slice(0, 10)}.tar.gz`;
    a.click();
    setTimeout(() => URL.revokeObjectURL(a.href), 10_000);
  };
  const busy = done !== undefined;
  return (
    <Page title={s.title} lead={s.lead} operations={reads}>
      <div className="varve-stack">
        <Form onSubmit={(e) => { e.preventDefault(); void gather(); }}>
          <FormGroup label={s.choose} role="group" fieldId="sections">
            <div className="varve-grid varve-choices">
              {offered.map((x) => (
                <Checkbox key={x.name} id={`section-${x.name}`} label={x.name} description={x.what} isChecked={chosen.includes(x.name)}
                  onChange={(_, on) => setChosen(on ? [...chosen, x.name] : chosen.filter((n) => n !== x.name))} />
              ))}
            </div>
          </FormGroup>
          <div className="varve-row">
            <Button type="submit" variant={parts ? 'secondary' : 'primary'} isLoading={busy} isDisabled={busy || chosen.length === 0}>{parts ? s.again : s.collect}</Button>
            {parts && <Button onClick={() => void save().catch((e: unknown) => toast.failed(e))}>{s.download}</Button>}
            {chosen.length === 0 && <span className="varve-dim">{s.none}</span>}
          </div>
        </Form>
        {busy && <Progress size="sm" value={(done / chosen.length) * 100} label={s.working(done, chosen.length)} aria-label={s.collect} />}
        {parts && (
          <section aria-label={s.read} className="varve-stack">
            <Content component="h2">{s.read}</Content>
            {parts.map((p) => (p.missing === undefined ? (
              <ExpandableSection key={p.name} toggleText={`${p.name}: ${s.items(p.count)}, ${bytes(p.text.length)}`}>
                <pre className="varve-code varve-long" tabIndex={0} aria-label={p.name}>{p.text}</pre>
              </ExpandableSection>
            ) : <Content key={p.name} component="p">{p.name}: {s.missing}: {p.missing}</Content>))}
          </section>
        )}
        <Content component="p" className="varve-dim">{s.crash}</Content>
      </div>
    </Page>
  );
}
