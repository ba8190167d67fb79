/* Numbers and words. */

const percent = (value, digits = 1) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)} %`);

/** So many significant digits, without noughts that say nothing. */
function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return String(value);
  const rounded = Number(value.toPrecision(digits));
  return rounded !== 0 && (Math.abs(rounded) < 1e-4 || Math.abs(rounded) >= 1e7) ? rounded.toExponential() : String(rounded);
}

const signed = (value, digits = 4) => (value > 0 ? `+${number(value, digits)}` : number(value, digits));

const thousands = (value) => String(Math.round(value)).replace(/\B(?=(\d{3})+(?!\d))/g, ",");

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 120) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(0)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const mean = (values) => {
  let total = 0, count = 0;
  for (const value of values) if (value !== null && value !== undefined && !Number.isNaN(value)) { total += value; count += 1; }
  return count ? total / count : null;
};

/** The least and the greatest; a spread of all values as arguments would be too many. */
function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

const plural = (count, one, many = `${one}s`) => `${thousands(count)} ${count === 1 ? one : many}`;
