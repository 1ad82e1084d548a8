"""Show what a run is worth: its folder, the terminal table, the charts, the HTML page."""
