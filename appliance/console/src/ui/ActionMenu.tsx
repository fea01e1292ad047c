// What can be done to an object, behind one button: of a page beside its most common action, of a row of a table at its end. The keyboard goes
// into the open menu, and back to the button when something is chosen, so that it is there again after the dialog that it opened.
import { Divider, Dropdown, DropdownItem, DropdownList, MenuToggle } from '@patternfly/react-core';
import type { MenuToggleElement } from '@patternfly/react-core';
import { EllipsisVIcon } from '@patternfly/react-icons';
import { useState } from 'react';

export interface MenuAction {
  title: string;
  onClick: () => void;
  disabled?: boolean;
  danger?: boolean;
  /** A line above it. */
  separated?: boolean;
}

export function ActionMenu({ label, actions }: { label: string; actions: MenuAction[] }) {
  const [open, setOpen] = useState(false);
  return (
    <Dropdown isOpen={open} onOpenChange={setOpen} onSelect={() => setOpen(false)} popperProps={{ position: 'end' }} shouldFocusFirstItemOnOpen shouldFocusToggleOnSelect
      toggle={(ref: React.Ref<MenuToggleElement>) => (
        <MenuToggle ref={ref} variant="plain" isExpanded={open} onClick={() => setOpen(!open)} aria-label={label} icon={<EllipsisVIcon />} />
      )}>
      <DropdownList>
        {actions.flatMap((a) => [
          ...(a.separated ? [<Divider key={`${a.title}-line`} component="li" />] : []),
          <DropdownItem key={a.title} isDisabled={a.disabled ?? false} isDanger={a.danger ?? false} onClick={a.onClick}>{a.title}</DropdownItem>,
        ])}
      </DropdownList>
    </Dropdown>
  );
}
