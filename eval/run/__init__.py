"""One run: distil, distil the clean twin, train victims, measure, record."""
