// Starts the page: one view for each name in the fragment.

import { start } from "./app.js";
import { view as compare } from "./compare.js";
import { view as explorer } from "./explorer.js";
import { view as monitor } from "./monitor.js";
import { view as playground } from "./playground.js";

start([playground, explorer, monitor, compare]);
