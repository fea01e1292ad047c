// The table of every list: sort, filter, columns, page and search are in the address, so that a reload or a link shows the same; the server
// sorts, filters and cuts pages. Rows may be acted upon, several at once, and the whole list exported as CSV.
import {
  Button, EmptyState, EmptyStateActions, EmptyStateBody, EmptyStateFooter, MenuToggle, Pagination, SearchInput, Select, SelectList, SelectOption, Skeleton,
  Toolbar, ToolbarContent, ToolbarGroup, ToolbarItem,
} from '@patternfly/react-core';
import type { MenuToggleElement } from '@patternfly/react-core';
import { ColumnsIcon, DownloadIcon, SearchIcon } from '@patternfly/react-icons';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { useEffect, useMemo, useRef, useState } from 'react';
import type { ComponentType, ReactNode } from 'react';
import { useSearchParams } from 'react-router';
import { call } from '../api/call';
import type { Answer, Args, ItemOf, Op } from '../api/call';
import { useCall } from '../api/query';
import { t } from '../strings';
import { ActionMenu } from './ActionMenu';
import { csvCell } from './format';
import { ProblemAlert } from './Problem';
import { useToast } from './toast';

export interface Column<T> {
  /** The field's name in the API: what is sorted by, and the CSV's heading. */
  key: string;
  title: string;
  cell: (row: T) => ReactNode;
  /** Of the CSV; the field's value if left out. */
  csv?: (row: T) => unknown;
  sortable?: boolean;
  /** Not shown until it is chosen. */
  hidden?: boolean;
  right?: boolean;
  /** Short words: not broken over lines. */
  whole?: boolean;
}

export interface Facet {
  key: string;
  title: string;
  options: [string, string][];
}

export interface Action<T> {
  title: string;
  onClick: (row: T) => void;
  danger?: boolean;
  disabled?: boolean;
  separated?: boolean;
}

export interface BulkAction<T> {
  title: string;
  onClick: (rows: T[]) => void;
  danger?: boolean;
}

interface Props<O extends Op, T> {
  /** Name of the table, for assistive technology and where what was chosen is kept. */
  id: string;
  label: string;
  op: O;
  args?: { path?: Args<O>['path']; query?: Args<O>['query'] };
  columns: Column<T>[];
  rowKey: (row: T) => string;
  /** The field that the search looks into; "" for a list without a search. */
  search?: string;
  searchLabel?: string;
  facets?: Facet[];
  actions?: (row: T) => Action<T>[];
  bulk?: BulkAction<T>[];
  /** Buttons at the right of the toolbar. */
  tools?: ReactNode;
  empty: { title: string; body: ReactNode; action?: ReactNode; icon?: ComponentType };
  /** Milliseconds between readings of figures that no event tells of. */
  every?: number;
  sort?: string;
}

const pageSizes = [20, 50, 100];
const csvRowsMax = 50_000;

/** An empty value is a dash, or on a narrow page a name would stand there alone. */
const shown = (v: ReactNode) => (v === '' || v === undefined || v === null ? '–' : v);

const quote = (s: string) => `"${s.replaceAll('\\', '\\\\').replaceAll('"', '\\"')}"`;

type Listed<T> = { items: T[]; next?: string; count?: number };

export function ObjectTable<O extends Op, T = ItemOf<O>>(props: Props<O, T>) {
  const { id, label, op, columns, rowKey, facets = [], bulk = [] } = props;
  const search = props.search ?? 'name';
  const [params, setParams] = useSearchParams();
  const q = params.get('q') ?? '';
  const sort = params.get('sort') ?? props.sort ?? '';
  const per = pageSizes.includes(Number(params.get('per'))) ? Number(params.get('per')) : pageSizes[0]!;
  const cursor = params.get('cursor') ?? '';
  const page = Math.max(1, Number(params.get('page')) || 1);
  const [text, setText] = useState(q);
  const [selected, setSelected] = useState<Map<string, T>>(new Map());
  const [exporting, setExporting] = useState(false);
  const cursors = useRef<string[]>([]);
  const toast = useToast();

  const set = (changes: Record<string, string>, firstPage = true) => setParams((before) => {
    const p = new URLSearchParams(before);
    if (firstPage) ['cursor', 'page'].forEach((k) => p.delete(k));
    for (const [k, v] of Object.entries(changes)) v === '' ? p.delete(k) : p.set(k, v);
    return p;
  }, { replace: true });

  useEffect(() => setText(q), [q]);
  useEffect(() => {
    if (text === q) return;
    const wait = setTimeout(() => set({ q: text }), 250);
    return () => clearTimeout(wait);
  // Only what is typed starts the wait.
  // eslint-disable-next-line
  }, [text]);

  const filter = useMemo(() => {
    const parts: string[] = [];
    const own = (props.args?.query as Record<string, unknown> | undefined)?.filter;
    if (typeof own === 'string' && own) parts.push(`(${own})`);
    if (q && search) parts.push(`${search}~${quote(q)}`);
    for (const f of facets) {
      const v = params.get(`f.${f.key}`);
      if (v) parts.push(`${f.key}=${quote(v)}`);
    }
    return parts.join(' and ');
  }, [params, q, search, facets, props.args]);

  const query = { ...props.args?.query, limit: per, cursor, sort, filter, count: true } as unknown as Args<O>['query'];
  const list = useCall(op, { path: props.args?.path, query } as Args<O>, { keep: true, ...(props.every ? { every: props.every } : {}) });
  const data = list.data as Listed<T> | undefined;
  const rows = data?.items ?? [];
  const count = data?.count ?? rows.length;
  const filtered = filter !== '' && filter !== `(${(props.args?.query as Record<string, unknown> | undefined)?.filter})`;

  const chosen = params.get('cols');
  const visible = columns.filter((c) => (chosen ? chosen.split(',').includes(c.key) : !c.hidden));
  const sorted = visible.findIndex((c) => c.key === sort.replace(/^-/, ''));

  const next = () => {
    cursors.current[page] = cursor;
    set({ cursor: data?.next ?? '', page: String(page + 1) }, false);
  };
  const previous = () => (page > 2 && cursors.current[page - 1] !== undefined
    ? set({ cursor: cursors.current[page - 1] ?? '', page: String(page - 1) }, false) : set({}));

  const exportCSV = async () => {
    setExporting(true);
    try {
      const lines = [columns.map((c) => csvCell(c.key)).join(',')];
      let at = '';
      do {
        const answer = (await call(op, { path: props.args?.path, query: { ...props.args?.query, limit: 1000, cursor: at, sort, filter } } as unknown as Args<O>)) as unknown as Listed<T>;
        for (const row of answer.items) {
          lines.push(columns.map((c) => csvCell(c.csv ? c.csv(row) : (row as Record<string, unknown>)[c.key])).join(','));
        }
        at = answer.next ?? '';
      } while (at !== '' && lines.length < csvRowsMax);
      const url = URL.createObjectURL(new Blob([lines.join('\r\n') + '\r\n'], { type: 'text/csv' }));
      const a = document.createElement('a');
      a.href = url;
      a.download = `${id}-${new Date().toISOString().slice(0, 10)}.csv`;
      a.click();
      setTimeout(() => URL.revokeObjectURL(url), 10_000);
    } catch (e) {
      toast.failed(e);
    } finally {
      setExporting(false);
    }
  };

  const toggle = (row: T, on: boolean) => setSelected((before) => {
    const m = new Map(before);
    if (on) m.set(rowKey(row), row);
    else m.delete(rowKey(row));
    return m;
  });

  if (data && count === 0 && !filtered && page === 1) {
    return (
      <EmptyState titleText={props.empty.title} headingLevel="h2" {...(props.empty.icon ? { icon: props.empty.icon } : {})}>
        <EmptyStateBody>{props.empty.body}</EmptyStateBody>
        {props.empty.action && <EmptyStateFooter><EmptyStateActions>{props.empty.action}</EmptyStateActions></EmptyStateFooter>}
      </EmptyState>
    );
  }

  const pagination = (where: 'top' | 'bottom') => (
    <Pagination isCompact itemCount={count} page={page} perPage={per} perPageOptions={pageSizes.map((n) => ({ title: String(n), value: n }))}
      onPerPageSelect={(_, n) => set({ per: String(n) })} onNextClick={next} onPreviousClick={previous} variant={where}
      titles={{ paginationAriaLabel: `${label}: ${where}` }} {...(where === 'bottom' ? { dropDirection: 'up' as const } : {})} widgetId={`${id}-${where}`}
      isDisabled={list.isPlaceholderData} />
  );

  return (
    <div>
      <Toolbar id={`${id}-toolbar`} className="varve-tools" clearAllFilters={() => set({ q: '', ...Object.fromEntries(facets.map((f) => [`f.${f.key}`, ''])) })}>
        <ToolbarContent>
          {search && (
            <ToolbarItem>
              <SearchInput aria-label={props.searchLabel ?? t.table.filter} placeholder={props.searchLabel ?? t.table.filter} value={text}
                onChange={(_, v) => setText(v)} onClear={() => (setText(''), set({ q: '' }))} />
            </ToolbarItem>
          )}
          {facets.map((f) => (
            <ToolbarItem key={f.key}>
              <FacetSelect facet={f} value={params.get(`f.${f.key}`) ?? ''} onChange={(v) => set({ [`f.${f.key}`]: v })} />
            </ToolbarItem>
          ))}
          <ToolbarGroup variant="action-group">
            {selected.size > 0 ? bulk.map((b) => (
              <ToolbarItem key={b.title}>
                <Button variant={b.danger ? 'danger' : 'secondary'} onClick={() => b.onClick([...selected.values()])}>{b.title}</Button>
              </ToolbarItem>
            )) : props.tools}
            {selected.size > 0 && <ToolbarItem><span aria-live="polite">{t.table.selected(selected.size)}</span></ToolbarItem>}
          </ToolbarGroup>
          <ToolbarGroup variant="action-group-plain" align={{ default: 'alignEnd' }}>
            <ToolbarItem>
              <ColumnSelect columns={columns} visible={visible} onChange={(keys) => set({ cols: keys.join(',') }, false)} />
            </ToolbarItem>
            <ToolbarItem>
              <Button variant="plain" icon={<DownloadIcon />} aria-label={exporting ? t.table.csvBusy : t.table.csv} title={t.table.csv} isDisabled={exporting}
                onClick={() => void exportCSV()} />
            </ToolbarItem>
            <ToolbarItem variant="pagination">{pagination('top')}</ToolbarItem>
          </ToolbarGroup>
        </ToolbarContent>
      </Toolbar>
      {list.error ? <ProblemAlert error={list.error} onRetry={() => void list.refetch()} /> : null}
      {data && rows.length === 0 ? (
        <EmptyState titleText={t.table.none} headingLevel="h2" icon={SearchIcon}>
          <EmptyStateBody>{t.table.noneBody}</EmptyStateBody>
          <EmptyStateFooter><EmptyStateActions>
            <Button variant="link" onClick={() => (setText(''), set({ q: '', ...Object.fromEntries(facets.map((f) => [`f.${f.key}`, ''])) }))}>{t.table.clear}</Button>
          </EmptyStateActions></EmptyStateFooter>
        </EmptyState>
      ) : (
        <Table aria-label={label} variant="compact" gridBreakPoint="grid-lg" id={id}>
          <Thead>
            <Tr>
              {bulk.length > 0 && (
                <Th aria-label={t.table.selectAll} select={{ isSelected: rows.length > 0 && rows.every((r) => selected.has(rowKey(r))),
                  onSelect: (_, on) => rows.forEach((r) => toggle(r, on)) }} />
              )}
              {visible.map((c, i) => (
                <Th key={c.key} modifier="nowrap" className={c.right ? 'varve-right' : ''} {...(c.sortable === false ? {} : { sort: {
                  sortBy: sorted >= 0 ? { index: sorted, direction: sort.startsWith('-') ? 'desc' as const : 'asc' as const } : {},
                  columnIndex: i, onSort: (_e: unknown, _i: number, d: string) => set({ sort: (d === 'desc' ? '-' : '') + c.key }),
                } })}>{c.title}</Th>
              ))}
              {props.actions && <Th screenReaderText={t.table.actions} />}
            </Tr>
          </Thead>
          <Tbody>
            {data === undefined && !list.error && Array.from({ length: 5 }, (_, i) => (
              <Tr key={i}>
                {bulk.length > 0 && <Td />}
                {visible.map((c) => <Td key={c.key}><Skeleton screenreaderText={t.loading} /></Td>)}
                {props.actions && <Td />}
              </Tr>
            ))}
            {rows.map((row, i) => {
              const acts = props.actions?.(row) ?? [];
              return (
                <Tr key={rowKey(row)}>
                  {bulk.length > 0 && (
                    <Td select={{ rowIndex: i, isSelected: selected.has(rowKey(row)), onSelect: (_, on) => toggle(row, on) }} />
                  )}
                  {visible.map((c) => <Td key={c.key} dataLabel={c.title} className={c.right ? 'varve-right' : ''} modifier={c.whole || c.right ? 'nowrap' : 'breakWord'}>{shown(c.cell(row))}</Td>)}
                  {props.actions && (
                    <Td isActionCell>
                      {acts.length > 0 && <ActionMenu label={t.table.rowActions} actions={acts.map((a) => ({ ...a, onClick: () => a.onClick(row) }))} />}
                    </Td>
                  )}
                </Tr>
              );
            })}
          </Tbody>
        </Table>
      )}
      {count > per && <Toolbar><ToolbarContent><ToolbarItem align={{ default: 'alignEnd' }} variant="pagination">{pagination('bottom')}</ToolbarItem></ToolbarContent></Toolbar>}
    </div>
  );
}

function FacetSelect({ facet, value, onChange }: { facet: Facet; value: string; onChange: (v: string) => void }) {
  const [open, setOpen] = useState(false);
  const shown = facet.options.find(([v]) => v === value)?.[1];
  return (
    <Select isOpen={open} onOpenChange={setOpen} selected={value} onSelect={(_, v) => (onChange(String(v)), setOpen(false))}
      toggle={(ref: React.Ref<MenuToggleElement>) => (
        <MenuToggle ref={ref} onClick={() => setOpen(!open)} isExpanded={open}>{shown ? `${facet.title}: ${shown}` : t.table.any(facet.title)}</MenuToggle>
      )}>
      <SelectList>
        <SelectOption value="">{t.table.any(facet.title)}</SelectOption>
        {facet.options.map(([v, text]) => <SelectOption key={v} value={v}>{text}</SelectOption>)}
      </SelectList>
    </Select>
  );
}

function ColumnSelect<T>({ columns, visible, onChange }: { columns: Column<T>[]; visible: Column<T>[]; onChange: (keys: string[]) => void }) {
  const [open, setOpen] = useState(false);
  const on = (c: Column<T>) => visible.includes(c);
  return (
    <Select isOpen={open} onOpenChange={setOpen} popperProps={{ position: 'end' }}
      onSelect={(_, key) => onChange(columns.filter((c) => (c.key === key ? !on(c) : on(c))).map((c) => c.key))}
      toggle={(ref: React.Ref<MenuToggleElement>) => (
        <MenuToggle ref={ref} variant="plain" onClick={() => setOpen(!open)} isExpanded={open} aria-label={t.table.columns} title={t.table.columns} icon={<ColumnsIcon />} />
      )}>
      <SelectList aria-label={t.table.columns}>
        {columns.map((c, i) => (
          <SelectOption key={c.key} value={c.key} hasCheckbox isSelected={on(c)} isDisabled={i === 0}>{c.title}</SelectOption>
        ))}
      </SelectList>
    </Select>
  );
}

export type { Answer };
