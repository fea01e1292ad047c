import react from '@vitejs/plugin-react';
import { defineConfig } from 'vite';

// `npx vite` serves the sources with a running appliance behind them: VARVE_URL=https://127.0.0.1:8443 npx vite
const appliance = process.env.VARVE_URL ?? 'https://127.0.0.1:8443';

export default defineConfig({
  plugins: [react()],
  build: { target: 'es2022', emptyOutDir: false, assetsInlineLimit: 0, sourcemap: false, reportCompressedSize: true, modulePreload: { polyfill: false } },
  server: { proxy: { '/api': { target: appliance, secure: false } } },
});
