// Addresses of objects in the console.
export const vdiskPath = (name: string) => `/vdisks/${encodeURIComponent(name)}`;
export const vpoolPath = (name: string) => `/vpools/${encodeURIComponent(name)}`;
export const nodePath = (name: string) => `/nodes/${encodeURIComponent(name)}`;
export const vmachinePath = (id: string) => `/vmachines/${encodeURIComponent(id)}`;
export const hypervisorPath = (name: string) => `/hypervisors/${encodeURIComponent(name)}`;
