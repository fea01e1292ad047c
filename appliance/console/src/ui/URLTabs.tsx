import { Tab, TabTitleText, Tabs } from '@patternfly/react-core';
import type { ReactNode } from 'react';
import { useSearchParams } from 'react-router';

/** Tabs whose choice is in the address. */
export function URLTabs({ label, tabs }: { label: string; tabs: [string, string, () => ReactNode][] }) {
  const [params, setParams] = useSearchParams();
  const active = tabs.find(([k]) => k === params.get('tab'))?.[0] ?? tabs[0]![0];
  return (
    <Tabs activeKey={active} aria-label={label} onSelect={(_, k) => setParams(k === tabs[0]![0] ? {} : { tab: String(k) }, { replace: true })} mountOnEnter unmountOnExit>
      {tabs.map(([k, title, body]) => <Tab key={k} eventKey={k} title={<TabTitleText>{title}</TabTitleText>}><div className="varve-tab">{active === k ? body() : null}</div></Tab>)}
    </Tabs>
  );
}
