// The events of one object.
import { ListIcon } from '@patternfly/react-icons';
import { useState } from 'react';
import type { ItemOf } from '../../api/call';
import { When } from '../../ui/State';
import { ObjectTable } from '../../ui/ObjectTable';
import { events } from '../../strings/events';

type Event = ItemOf<'listEvents'>;

export function EventList({ topic, objectKey }: { topic?: string; objectKey: string }) {
  const [query] = useState({ key: objectKey, ...(topic ? {} : {}) });
  return (
    <ObjectTable id="object-events" label={events.title} op="listEvents" args={{ query }} rowKey={(e: Event) => String(e.seq)} search="type" searchLabel={events.filter}
      columns={[
        { key: 'at', title: events.at, cell: (e) => <When at={e.at} exact /> },
        { key: 'type', title: events.type, cell: (e) => e.type.replaceAll('_', ' ') },
        { key: 'data', title: events.data, sortable: false, cell: (e) => <span className="varve-code">{facts(e.data)}</span>, csv: (e) => JSON.stringify(e.data) },
      ]}
      empty={{ title: events.empty, body: events.emptyBody, icon: ListIcon }} />
  );
}

/** What an event says, as "name value" pairs. */
export function facts(data: unknown): string {
  if (!data || typeof data !== 'object') return '';
  return Object.entries(data).map(([k, v]) => `${k} ${typeof v === 'object' ? JSON.stringify(v) : String(v)}`).join(', ');
}
