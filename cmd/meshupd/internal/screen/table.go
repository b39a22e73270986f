package screen

import (
	"strings"
	"unicode/utf8"
)

// Column of a Table.
type Column struct {
	Title string
	Min   int // narrowest width
	Max   int // widest; 0: no limit. The last column takes what is left and wraps.
}

// Table has fixed columns; every cell has a word, so that no row can be misread.
type Table struct {
	Columns []Column
	Rows    [][]string // clean cells
}

const columnGap = 2

// Draw writes the table; no line is wider than the canvas unless the columns' least widths are.
func (t Table) Draw(c Canvas) string {
	widths := t.widths()
	indent := 0
	for _, w := range widths[:len(widths)-1] {
		indent += w + columnGap
	}
	last := max(c.Width-indent, t.Columns[len(widths)-1].Min, 12)
	var b strings.Builder
	row := func(cells []string, paint string) {
		line := ""
		for i, w := range widths[:len(widths)-1] {
			line += c.Pad(cells[i], w) + strings.Repeat(" ", columnGap)
		}
		for i, part := range Wrap(cells[len(cells)-1], last) {
			if i > 0 {
				line = strings.Repeat(" ", indent)
			}
			b.WriteString(c.Paint(paint, strings.TrimRight(line+part, " ")))
			b.WriteByte('\n')
		}
	}
	titles := make([]string, len(t.Columns))
	for i, col := range t.Columns {
		titles[i] = col.Title
	}
	row(titles, Bold)
	for _, cells := range t.Rows {
		row(cells, "")
	}
	return b.String()
}

func (t Table) widths() []int {
	widths := make([]int, len(t.Columns))
	for i, col := range t.Columns {
		w := max(utf8.RuneCountInString(col.Title), col.Min)
		for _, row := range t.Rows {
			w = max(w, utf8.RuneCountInString(row[i]))
		}
		if col.Max > 0 {
			w = min(w, col.Max)
		}
		widths[i] = w
	}
	return widths
}
