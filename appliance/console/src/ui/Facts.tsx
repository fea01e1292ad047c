import { DescriptionList, DescriptionListDescription, DescriptionListGroup, DescriptionListTerm } from '@patternfly/react-core';
import type { ReactNode } from 'react';

/** Names and values, in columns where there is room. */
export function Facts({ items }: { items: [string, ReactNode][] }) {
  return (
    <DescriptionList columnModifier={{ default: '1Col', md: '2Col' }} isHorizontal orientation={{ md: 'vertical' }} isCompact>
      {items.map(([k, v]) => (
        <DescriptionListGroup key={k}><DescriptionListTerm>{k}</DescriptionListTerm><DescriptionListDescription>{v}</DescriptionListDescription></DescriptionListGroup>
      ))}
    </DescriptionList>
  );
}
