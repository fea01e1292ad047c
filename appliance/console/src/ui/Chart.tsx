// Figures over time: uPlot on a canvas, a sentence for those who do not see it, and the same as a table.
import { Alert, Button, Card, CardBody, CardTitle, Content, ToggleGroup, ToggleGroupItem } from '@patternfly/react-core';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { useEffect, useMemo, useRef, useState } from 'react';
import { useSearchParams } from 'react-router';
import uPlot from 'uplot';
import 'uplot/dist/uPlot.min.css';
import type { Answer } from '../api/call';
import { useCall } from '../api/query';
import { useDark } from '../shell/theme';
import { operate } from '../strings/operate';
import { bytes, duration, number, time } from './format';
import { Loaded } from './Page';

const s = operate.chart;
type History = Answer<'getHistory'>;
type Series = History['series'][number];

const ranges = [3600, 86400, 604800, 2592000];
const points = 300;
const tableRows = 60;

const panels: [string, string[]][] = [
  [s.iops, ['read_iops', 'write_iops']], [s.rate, ['read_bytes', 'write_bytes']], [s.latency, ['read_p50', 'read_p99', 'write_p50', 'write_p99']],
  [s.capacity, ['used']], [s.pending, ['pending']], [s.cpu, ['cpu']], [s.memory, ['memory']], [s.logUsed, ['log_used']],
];

function formatted(unit: string): (v: number) => string {
  switch (unit) {
    case 'bytes': return bytes;
    case 'bytes/s': return (v) => `${bytes(v)}/s`;
    case 'seconds': return duration;
    case 'ratio': return (v) => `${(v * 100).toFixed(v < 0.1 ? 1 : 0)} %`;
    case '1/s': return (v) => `${number(v)}/s`;
  }
  return number;
}

/** All charts of an object: "node:NAME", "vpool:NAME" or "vdisk:VPOOL/PATH". */
export function Charts({ object, only }: { object: string; only?: string[] }) {
  const [params, setParams] = useSearchParams();
  const range = ranges.includes(Number(params.get('range'))) ? Number(params.get('range')) : ranges[0]!;
  const [table, setTable] = useState(false);
  // The window moves with the time, a step at once, so that what was read can be shared.
  const [now, setNow] = useState(() => Math.floor(Date.now() / 10_000) * 10);
  useEffect(() => {
    const tick = setInterval(() => document.visibilityState === 'visible' && setNow(Math.floor(Date.now() / 10_000) * 10), range > 86400 ? 60_000 : 10_000);
    return () => clearInterval(tick);
  }, [range]);
  const wanted = panels.filter(([, metrics]) => !only || metrics.some((m) => only.includes(m)));
  const history = useCall('getHistory', { query: { object, from: now - range, to: now, points, ...(only ? { metric: only.join(',') } : {}) } }, { keep: true });
  return (
    <div className="varve-stack">
      <div className="varve-row">
        <ToggleGroup aria-label={s.range}>
          {ranges.map((r) => (
            <ToggleGroupItem key={r} text={s.ranges[r]} isSelected={r === range}
              onChange={() => setParams((p) => { const q = new URLSearchParams(p); q.set('range', String(r)); return q; }, { replace: true })} />
          ))}
        </ToggleGroup>
        <Button variant="link" isInline onClick={() => setTable(!table)}>{table ? s.chart : s.table}</Button>
      </div>
      <Loaded query={history}>
        {(h) => (
          <div className="varve-grid varve-charts">
            {wanted.map(([title, metrics]) => {
              const series = h.series.filter((x) => metrics.includes(x.metric));
              return series.length > 0 && <Panel key={title} title={title} history={h} series={series} table={table} />;
            })}
            {h.series.length === 0 && <Alert isInline isPlain variant="info" title={s.none} component="h2" />}
          </div>
        )}
      </Loaded>
    </div>
  );
}

function summary(x: Series): string {
  const known = x.values.filter((v): v is number => v !== null);
  if (known.length === 0) return '';
  const f = formatted(x.unit);
  const mean = known.reduce((a, b) => a + b, 0) / known.length;
  return s.summary(s.metrics[x.metric] ?? x.metric, f(known[known.length - 1]!), f(Math.min(...known)), f(Math.max(...known)), f(mean));
}

function Panel({ title, history, series, table }: { title: string; history: History; series: Series[]; table: boolean }) {
  const text = series.map(summary).filter(Boolean);
  return (
    <Card isCompact>
      <CardTitle component="h2">{title}</CardTitle>
      <CardBody className="varve-stack">
        {text.length === 0 ? <Content component="p" className="varve-dim">{s.none}</Content> : table ? <Figures history={history} series={series} title={title} />
          : <Plot history={history} series={series} label={title} />}
        {text.length > 0 && <div className="varve-dim">{text.map((x) => <div key={x}>{x}</div>)}</div>}
      </CardBody>
    </Card>
  );
}

function Figures({ history, series, title }: { history: History; series: Series[]; title: string }) {
  const n = series[0]?.values.length ?? 0;
  const every = Math.max(1, Math.ceil(n / tableRows));
  const rows = Array.from({ length: n }, (_, i) => i).filter((i) => i % every === 0 && series.some((x) => x.values[i] !== null)).reverse();
  return (
    <div className="varve-long" tabIndex={0} role="region" aria-label={title}>
      <Table variant="compact" aria-label={title} gridBreakPoint="">
        <Thead><Tr><Th>{s.time}</Th>{series.map((x) => <Th key={x.metric}>{s.metrics[x.metric] ?? x.metric}</Th>)}</Tr></Thead>
        <Tbody>
          {rows.map((i) => (
            <Tr key={i}><Td>{time(new Date((history.from + i * history.step) * 1000))}</Td>
              {series.map((x) => { const v = x.values[i]; return <Td key={x.metric}>{v === null || v === undefined ? '–' : formatted(x.unit)(v)}</Td>; })}</Tr>
          ))}
        </Tbody>
      </Table>
    </div>
  );
}

const lines = { light: ['#0066cc', '#b35c00', '#3d7317', '#8b43ab'], dark: ['#73bcf7', '#f0ab00', '#8bc158', '#d2a6e8'] };
const height = 180;

const clock = new Intl.DateTimeFormat('en-GB', { hour: '2-digit', minute: '2-digit' });
const day = new Intl.DateTimeFormat('en-GB', { day: 'numeric', month: 'short' });
/** Times of day within a day, days beyond; midnight says which day it is. */
function axisTime(seconds: number, step: number): string {
  const at = new Date(seconds * 1000);
  return step >= 86400 || (at.getHours() === 0 && at.getMinutes() === 0) ? day.format(at) : clock.format(at);
}

function Plot({ history, series, label }: { history: History; series: Series[]; label: string }) {
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot>(undefined);
  const dark = useDark();
  const data = useMemo<uPlot.AlignedData>(() => {
    const n = series[0]?.values.length ?? 0;
    return [Array.from({ length: n }, (_, i) => history.from + i * history.step), ...series.map((x) => x.values.map((v) => v ?? null))];
  }, [history, series]);
  const shape = series.map((x) => x.metric + x.unit).join();
  const latest = useRef(data);
  latest.current = data;
  useEffect(() => {
    const at = box.current;
    if (!at) return;
    const style = getComputedStyle(at);
    const grid = { stroke: dark ? '#3c3f42' : '#e0e0e0', width: 1 };
    const colour = style.color;
    const f = formatted(series[0]?.unit ?? '');
    const u = new uPlot({
      width: Math.max(at.clientWidth, 100), height, cursor: { sync: { key: 'varve' }, drag: { x: false, y: false } }, legend: { show: series.length > 1 },
      scales: { y: { range: (_u, _min, max) => [0, max > 0 ? max * 1.1 : 1] } },
      axes: [{ stroke: colour, grid, ticks: grid, font: '12px sans-serif', space: 64, values: (_u, at, _i, _s, step) => at.map((x) => axisTime(x, step)) }, { stroke: colour, grid, ticks: grid, size: 76, font: '12px sans-serif', values: (_u, v) => v.map((x) => f(x)) }],
      series: [{ label: s.time, value: (_u: uPlot, v: number | null) => (v === null ? '–' : time(new Date(v * 1000))) }, ...series.map((x, i) => ({ label: s.metrics[x.metric] ?? x.metric, stroke: lines[dark ? 'dark' : 'light'][i % 4]!, width: 1.5, ...(i % 2 ? { dash: [6, 3] } : {}),
        value: (_u: uPlot, v: number | null) => (v === null ? '–' : f(v)) }))],
    }, latest.current, at);
    plot.current = u;
    const resize = new ResizeObserver(() => u.setSize({ width: Math.max(at.clientWidth, 100), height }));
    resize.observe(at);
    return () => {
      resize.disconnect();
      u.destroy();
      plot.current = undefined;
    };
  // What is drawn changes with its lines and the theme; new figures are put in below.
  }, [shape, dark]);
  useEffect(() => plot.current?.setData(data), [data]);
  return <div ref={box} className="varve-chart" role="img" aria-label={label} />;
}
