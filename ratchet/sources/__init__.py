"""Where rows come from: files of any format, databases, documentation, feedback, reviewed drafts."""
