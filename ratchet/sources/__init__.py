"""Where rows come from: files, documentation, feedback, reviewed drafts."""
