"""Where images come from: every kind of source gives a listing of images as byte ranges of plain files."""
