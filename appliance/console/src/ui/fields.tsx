// Fields of forms. Each knows the name of its field in the request's body, so that what the server says of it stands beside it.
import { Checkbox, FormGroup, FormHelperText, FormSelect, FormSelectOption, HelperText, HelperTextItem, TextArea, TextInput } from '@patternfly/react-core';
import { createContext, useContext, useId } from 'react';
import type { ReactNode } from 'react';

export const FieldErrors = createContext<Record<string, string>>({});

interface FieldProps {
  label: string;
  /** Of the field in the request's body; what is below a field with "/" is its own. */
  name: string;
  value: string;
  onChange: (v: string) => void;
  help?: ReactNode;
  /** What is wrong with the value, as the console sees before it asks the server. */
  wrong?: string | undefined;
  required?: boolean;
  disabled?: boolean;
}

function Help({ id, help, wrong }: { id: string; help?: ReactNode; wrong: string | undefined }) {
  if (!help && !wrong) return null;
  return (
    <FormHelperText>
      <HelperText id={id} isLiveRegion>
        {wrong ? <HelperTextItem variant="error">{wrong}</HelperTextItem> : <HelperTextItem>{help}</HelperTextItem>}
      </HelperText>
    </FormHelperText>
  );
}

function useWrong(name: string, wrong: string | undefined) {
  const errors = useContext(FieldErrors);
  return wrong ?? errors[name];
}

export function TextField(props: FieldProps & { type?: 'text' | 'password' | 'email' | 'url' | 'number'; autoFocus?: boolean; autoComplete?: string; placeholder?: string; mono?: boolean }) {
  const id = useId();
  const wrong = useWrong(props.name, props.wrong);
  return (
    <FormGroup label={props.label} fieldId={id} isRequired={props.required ?? false}>
      <TextInput id={id} name={props.name} type={props.type ?? 'text'} value={props.value} onChange={(_, v) => props.onChange(v)} isRequired={props.required ?? false}
        isDisabled={props.disabled ?? false} validated={wrong ? 'error' : 'default'} aria-describedby={`${id}-help`} autoComplete={props.autoComplete ?? 'off'}
        placeholder={props.placeholder ?? ''} className={props.mono ? 'varve-mono' : ''} spellCheck={false}
        // The first field of a dialog is where the keyboard goes.
        autoFocus={props.autoFocus ?? false} />
      <Help id={`${id}-help`} help={props.help} wrong={wrong} />
    </FormGroup>
  );
}

export function TextAreaField(props: FieldProps & { rows?: number; mono?: boolean; placeholder?: string }) {
  const id = useId();
  const wrong = useWrong(props.name, props.wrong);
  return (
    <FormGroup label={props.label} fieldId={id} isRequired={props.required ?? false}>
      <TextArea id={id} name={props.name} value={props.value} onChange={(_, v) => props.onChange(v)} rows={props.rows ?? 4} resizeOrientation="vertical"
        validated={wrong ? 'error' : 'default'} aria-describedby={`${id}-help`} placeholder={props.placeholder ?? ''} className={props.mono ? 'varve-mono' : ''} spellCheck={false} />
      <Help id={`${id}-help`} help={props.help} wrong={wrong} />
    </FormGroup>
  );
}

export function SelectField(props: FieldProps & { options: [string, string][] }) {
  const id = useId();
  const wrong = useWrong(props.name, props.wrong);
  return (
    <FormGroup label={props.label} fieldId={id} isRequired={props.required ?? false}>
      <FormSelect id={id} name={props.name} value={props.value} onChange={(_, v) => props.onChange(v)} isDisabled={props.disabled ?? false} aria-describedby={`${id}-help`}
        validated={wrong ? 'error' : 'default'}>
        {props.options.map(([value, text]) => <FormSelectOption key={value} value={value} label={text} />)}
      </FormSelect>
      <Help id={`${id}-help`} help={props.help} wrong={wrong} />
    </FormGroup>
  );
}

export function CheckField({ label, name, value, onChange, help, disabled }: { label: string; name: string; value: boolean; onChange: (v: boolean) => void; help?: ReactNode; disabled?: boolean }) {
  const id = useId();
  return <Checkbox id={id} name={name} label={label} description={help} isChecked={value} onChange={(_, v) => onChange(v)} isDisabled={disabled ?? false} />;
}

/** Several of a few choices. */
export function ChoicesField({ label, name, value, onChange, options, help }: {
  label: string; name: string; value: string[]; onChange: (v: string[]) => void; options: [string, string, string?][]; help?: ReactNode;
}) {
  const id = useId();
  const wrong = useWrong(name, undefined);
  return (
    <FormGroup label={label} role="group" fieldId={id} isStack>
      {options.map(([v, text, description]) => (
        <Checkbox key={v} id={`${id}-${v}`} label={text} description={description} isChecked={value.includes(v)}
          onChange={(_, on) => onChange(on ? [...value, v] : value.filter((x) => x !== v))} />
      ))}
      <Help id={`${id}-help`} help={help} wrong={wrong} />
    </FormGroup>
  );
}
