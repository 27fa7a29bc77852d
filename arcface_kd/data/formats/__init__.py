"""File formats of face data: RecordIO, images, folders, verification sets, IJB."""
