// The frame of every page: a heading, its actions, what it reads and can do as API calls and command lines.
import {
  Breadcrumb, BreadcrumbItem, ClipboardCopy, Content, ExpandableSection, PageSection, Skeleton, Title,
} from '@patternfly/react-core';
import { useEffect, useState } from 'react';
import type { ReactNode } from 'react';
import { Link } from 'react-router';
import { onMade, operations } from '../api/call';
import type { Made, Op } from '../api/call';
import { t } from '../strings';
import { ProblemAlert } from './Problem';

interface Props {
  title: string;
  /** Where it is: [text, address] from the top. */
  trail?: [string, string][];
  label?: ReactNode;
  lead?: ReactNode;
  actions?: ReactNode;
  /** The operations that the page reads with and can do: shown as API calls and command lines. */
  operations: Op[];
  /** What takes the place of names in those lines, such as {vdisk: 'default/disk1'}. */
  names?: Record<string, string>;
  children: ReactNode;
}

export function Page({ title, trail, label, lead, actions, operations: ops, names, children }: Props) {
  useEffect(() => {
    document.title = `${title} · ${t.product}`;
  }, [title]);
  return (
    <>
      <PageSection className="varve-head" hasBodyWrapper={false}>
        {trail && (
          <Breadcrumb>
            {trail.map(([text, to]) => <BreadcrumbItem key={to}><Link to={to}>{text}</Link></BreadcrumbItem>)}
            <BreadcrumbItem isActive>{title}</BreadcrumbItem>
          </Breadcrumb>
        )}
        <div className="varve-title">
          <Title headingLevel="h1">{title}</Title>
          {label}
          {actions && <div className="varve-actions">{actions}</div>}
        </div>
        {lead && <Content component="p" className="varve-lead">{lead}</Content>}
      </PageSection>
      <PageSection hasBodyWrapper={false} className="varve-body">{children}</PageSection>
      <PageSection hasBodyWrapper={false} className="varve-foot"><Commands ops={ops} names={names ?? {}} /></PageSection>
    </>
  );
}

function Commands({ ops, names }: { ops: Op[]; names: Record<string, string> }) {
  const [open, setOpen] = useState(false);
  const [made, setMade] = useState<Made[]>([]);
  useEffect(() => onMade((m) => setMade((before) => [m, ...before].slice(0, 5))), []);
  const fill = (text: string) => Object.entries(names).reduce((s, [k, v]) => s.replace(`{${k}}`, encodeURIComponent(v)), text);
  const subject = Object.values(names)[0] ?? '';
  return (
    <ExpandableSection toggleText={t.made.title} isExpanded={open} onToggle={(_, v) => setOpen(v)}>
      {open && (
        <div className="varve-commands">
          {made.length > 0 && <Content component="h3">{t.made.last}</Content>}
          {made.map((m) => (
            <ClipboardCopy key={m.at.getTime() + m.url} isCode isReadOnly hoverTip={t.copy} clickTip={t.copied} variant="expansion">{curl(m)}</ClipboardCopy>
          ))}
          <dl>
            {ops.map((op) => {
              const o = operations[op];
              return (
                <div key={op}>
                  <dt>{o.summary}</dt>
                  <dd><code>{o.method} {fill(o.path)}</code></dd>
                  {o.cli && o.cli.split(' | ').map((line) => <dd key={line}><code>varve {line} {/list|status|health/.test(line) ? '' : subject}</code></dd>)}
                </div>
              );
            })}
          </dl>
        </div>
      )}
    </ExpandableSection>
  );
}

const quoted = (s: string) => `'${s.replaceAll("'", `'\\''`)}'`;

/** A call as a command line for curl. */
export function curl(m: Made): string {
  const parts = ['curl -H "Authorization: Bearer $TOKEN"'];
  if (m.method !== 'POST') parts.push(`-X ${m.method} -H 'If-Match: *'`);
  if (m.body) parts.push(`-H 'Content-Type: application/json' -d ${quoted(m.body)}`);
  parts.push(quoted(location.origin + m.url));
  return parts.join(' ');
}

/** Shows what was read, or that it is being read, or why it was not. A failure to read again leaves what is shown, with its age. */
export function Loaded<T>({ query, children, lines = 4 }: {
  query: { data: T | undefined; error: unknown; refetch: () => unknown };
  children: (data: T) => ReactNode;
  lines?: number;
}) {
  if (query.data !== undefined) {
    return (
      <>
        {query.error ? <ProblemAlert error={query.error} onRetry={() => void query.refetch()} /> : null}
        {children(query.data)}
      </>
    );
  }
  if (query.error) return <ProblemAlert error={query.error} onRetry={() => void query.refetch()} />;
  return (
    <div aria-busy="true">
      {Array.from({ length: lines }, (_, i) => <Skeleton key={i} className="varve-skeleton" screenreaderText={i === 0 ? t.loading : ''} />)}
    </div>
  );
}
