import { Tab, TabTitleText, Tabs } from '@patternfly/react-core';
import { useEffect, useRef } from 'react';
import type { ReactNode } from 'react';
import { useSearchParams } from 'react-router';

/** Tabs whose choice is in the address. */
export function URLTabs({ label, tabs }: { label: string; tabs: [string, string, () => ReactNode][] }) {
  const [params, setParams] = useSearchParams();
  const active = tabs.find(([k]) => k === params.get('tab'))?.[0] ?? tabs[0]![0];
  // Where they do not all fit, the one that is shown is among those that are seen.
  const bar = useRef<HTMLDivElement>(null);
  useEffect(() => {
    const list = bar.current?.querySelector('.pf-v6-c-tabs__list');
    const item = list?.querySelector<HTMLElement>('.pf-m-current');
    if (!list || !item) return;
    const show = new ResizeObserver(() => list.scrollTo({ left: item.offsetLeft - (list.clientWidth - item.clientWidth) / 2 }));
    show.observe(list);
    return () => show.disconnect();
  }, [active]);
  return (
    <div ref={bar}>
      <Tabs activeKey={active} aria-label={label} onSelect={(_, k) => setParams(k === tabs[0]![0] ? {} : { tab: String(k) }, { replace: true })} mountOnEnter unmountOnExit>
        {tabs.map(([k, title, body]) => <Tab key={k} eventKey={k} title={<TabTitleText>{title}</TabTitleText>}><div className="varve-tab">{active === k ? body() : null}</div></Tab>)}
      </Tabs>
    </div>
  );
}
